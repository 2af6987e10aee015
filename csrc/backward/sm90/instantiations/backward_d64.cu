#include "backward/sm90/instances.h"
#include "backward/sm90/launch_kernel.h"

namespace fpsattn::sm90::backward {

void launch_d64(const BackwardParams& params, cudaStream_t stream) { Launcher<64>(params, stream).run(); }

}  // namespace fpsattn::sm90::backward
