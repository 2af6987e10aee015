// The forward on Hopper, of checked parameters.
#pragma once

#include <cuda_runtime_api.h>

#include "fpsattn/params.h"

namespace fpsattn::sm90::forward {

size_t workspace_bytes(const ForwardParams& params);

// Clusters of two CTAs share the K and V loads of two query blocks of one tile (kernel.h). Where they pay: at D = 128 with
// K scales per tile or block, the only main loop that asks L2 for more than it gives (26 of 28 bytes per clock and SM;
// D = 64: 20, scales per token: 19), and at 5/3 query blocks a tile and more, where at least two in five, all but one a
// tile in general, have such a partner.
enum class Clusters { kWhereTheyPay, kNever, kAlways };
void launch(const ForwardParams& params, cudaStream_t stream, Clusters clusters = Clusters::kWhereTheyPay);

}  // namespace fpsattn::sm90::forward
