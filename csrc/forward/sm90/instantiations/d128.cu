#include "forward/sm90/launch_kernel.h"

namespace fpsattn::sm90::forward {
void launch_d128(const Arguments& args, int num_sms, cudaStream_t stream) {
  launch<Config<128, false>>(args, num_sms, stream);
}
}  // namespace fpsattn::sm90::forward
