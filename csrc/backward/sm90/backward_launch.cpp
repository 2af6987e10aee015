// Workspace, and the instance of a head dimension.
#include "backward/sm90/instances.h"
#include "backward/sm90/launch.h"
#include "backward/sm90/workspace.h"

namespace fpsattn::sm90::backward {

size_t workspace_bytes(const BackwardParams& params) {
  return Workspace::bytes_of(params, Workspace::heads_of(params, kWorkspaceLimit));
}
size_t least_workspace_bytes(const BackwardParams& params) { return Workspace::bytes_of(params, 1); }

void launch(const BackwardParams& params, cudaStream_t stream) {
  (code_dim(params.size.head_dim) == 64 ? launch_d64 : launch_d128)(params, stream);
}

}  // namespace fpsattn::sm90::backward
