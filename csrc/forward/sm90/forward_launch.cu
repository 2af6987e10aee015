// Tensor maps, schedule, kernel.
#include "common/numeric.h"
#include "common/sm90/tensor_map.h"
#include "forward/sm90/config.h"
#include "forward/sm90/instances.h"
#include "forward/sm90/launch.h"

namespace fpsattn::sm90::forward {
namespace {

constexpr const char* kOp = "forward";

template <int kHeadDim>
void encode_maps(const ForwardParams& params, Arguments& args) {
  using C = Config<kHeadDim, false>;  // scales do not change tiles
  const int64_t blocks = static_cast<int64_t>(args.batch_heads) * args.num_blocks;
  const int64_t kv_blocks = static_cast<int64_t>(args.batch_heads / args.group) * args.num_kv_blocks;
  args.q_map = tile_map<typename C::QTile>("forward: q8", params.q8, blocks * C::QTile::kRows);
  args.k_map = tile_map<typename C::KTile>("forward: k8", params.k8, kv_blocks * C::KTile::kRows);
  args.v_map = tile_map<typename C::VTile>("forward: v8t", params.v8t, kv_blocks * C::VTile::kRows);
}

Arguments arguments_of(const ForwardParams& params, const Workspace& workspace, bool clusters) {
  const ProblemSize& size = params.size;
  Arguments args{};
  args.cluster_size = clusters ? 2 : 1;
  args.head_dim = size.head_dim;
  args.batch_heads = size.batch * size.heads;
  args.heads = size.heads;
  args.num_tokens = size.num_tokens;
  args.num_blocks = size.num_blocks;
  args.group = size.group;
  args.num_kv_blocks = size.key_blocks();
  args.scale_log2 = scale_in_log2_units(params.softmax_scale);
  args.softmax_scale = params.softmax_scale;
  args.q_scale_per_token = params.q_scale_per_token;
  args.out_dtype = params.out_dtype;
  args.q_scale = params.q_scale;
  args.k_scale = params.k_scale;
  args.v_scale = params.v_scale;
  args.q_k_mean = params.q_k_mean;
  args.token_of_slot = params.token_of_slot;
  args.tile_of_block = params.tile_of_block;
  args.kv = params.kv;
  args.out = params.out;
  args.lse = params.lse;
  args.row_max = params.row_max;
  args.row_sum = params.row_sum;
  args.next_pair = workspace.next_pair;
  args.next_single = workspace.next_single;
  args.num_pairs = workspace.num_pairs;
  args.head_order = workspace.head_order;
  args.block_order = workspace.block_order;
  if (code_dim(size.head_dim) == 64) {
    encode_maps<64>(params, args);
  } else {
    encode_maps<128>(params, args);
  }
  return args;
}

Launcher launcher_of(const ForwardParams& params) {
  if (code_dim(params.size.head_dim) == 64) return params.k_scale_per_token ? launch_d64_k_per_token : launch_d64;
  return params.k_scale_per_token ? launch_d128_k_per_token : launch_d128;
}

bool clusters_pay(const ForwardParams& params) {
  const ProblemSize& size = params.size;
  return code_dim(size.head_dim) == 128 && !params.k_scale_per_token &&
         3 * int64_t{size.num_blocks} >= 5 * int64_t{size.num_tiles};
}

}  // namespace

size_t workspace_bytes(const ForwardParams& params) { return Workspace::at(nullptr, params).bytes; }

void launch(const ForwardParams& params, cudaStream_t stream, Clusters clusters) {
  int device = 0, num_sms = 0;
  FPSATTN_CUDA_CHECK(kOp, cudaGetDevice(&device));
  FPSATTN_CUDA_CHECK(kOp, cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device));
  const Workspace workspace = Workspace::at(params.workspace, params);
  const Arguments args =
      arguments_of(params, workspace,
                   clusters == Clusters::kAlways || (clusters == Clusters::kWhereTheyPay && clusters_pay(params)));
  launch_schedule(args, workspace, stream);
  launcher_of(params)(args, num_sms, stream);
}

}  // namespace fpsattn::sm90::forward
