#include "backward/sm90/instances.h"
#include "backward/sm90/launch_kernel.h"

namespace fpsattn::sm90::backward {

void launch_d128(const BackwardParams& params, cudaStream_t stream) { Launcher<128>(params, stream).run(); }

}  // namespace fpsattn::sm90::backward
