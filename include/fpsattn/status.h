// Errors of the C++ library: thrown, never printed, never exit().
//
// FPSATTN_CHECK(cond, "forward: head_dim is ", d, ", expected 64 or 128") throws fpsattn::Error with that text. The
// text names the operation and the argument, says what came and what was wanted. FPSATTN_CUDA_CHECK does the same for
// runtime calls.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace fpsattn {

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

namespace detail {

template <class... Parts>
[[noreturn]] void throw_error(const Parts&... parts) {
  std::ostringstream text;
  text << "fpsattn.";
  (text << ... << parts);
  throw Error(text.str());
}

}  // namespace detail
}  // namespace fpsattn

#define FPSATTN_CHECK(condition, ...)              \
  do {                                             \
    if (!(condition)) {                            \
      ::fpsattn::detail::throw_error(__VA_ARGS__); \
    }                                              \
  } while (0)

// Usable only where <cuda_runtime_api.h> is included. `what` names the operation, e.g. "quantize: launch".
#define FPSATTN_CUDA_CHECK(what, call)                                                                     \
  do {                                                                                                     \
    const cudaError_t fpsattn_status_ = (call);                                                            \
    if (fpsattn_status_ != cudaSuccess) {                                                                  \
      ::fpsattn::detail::throw_error(what, ": ", #call, " failed: ", cudaGetErrorString(fpsattn_status_)); \
    }                                                                                                      \
  } while (0)
