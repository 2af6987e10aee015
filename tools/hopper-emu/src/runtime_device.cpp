// Device queries, streams, events (everything executes synchronously), errors.
#include <chrono>
#include <cstdio>

#include "runtime_state.h"

using namespace hemu;

namespace {
struct Event {
  double t = 0;
};
double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }
}  // namespace

// ---------------------------------------------------------------- device queries
API cudaError_t cudaGetDeviceCount(int* n) {
  *n = 1;
  return cudaSuccess;
}
API cudaError_t cudaGetDevice(int* d) {
  *d = 0;
  return cudaSuccess;
}
API cudaError_t cudaSetDevice(int d) { return d == 0 ? cudaSuccess : ret(cudaErrorInvalidDevice); }
API cudaError_t cudaInitDevice(int, unsigned, unsigned) { return cudaSuccess; }
API cudaError_t cudaDeviceReset() { return cudaSuccess; }
API cudaError_t cudaSetDeviceFlags(unsigned) { return cudaSuccess; }
API cudaError_t cudaDeviceSetLimit(cudaLimit, size_t) { return cudaSuccess; }
API cudaError_t cudaDeviceSetCacheConfig(cudaFuncCache) { return cudaSuccess; }
API cudaError_t cudaDeviceGetStreamPriorityRange(int* a, int* b) {
  if (a) *a = 0;
  if (b) *b = -5;
  return cudaSuccess;
}
API cudaError_t cudaDeviceCanAccessPeer(int* c, int, int) {
  *c = 0;
  return cudaSuccess;
}
API cudaError_t cudaDriverGetVersion(int* v) {
  *v = 13000;
  return cudaSuccess;
}
API cudaError_t cudaRuntimeGetVersion(int* v) {
  *v = 13000;
  return cudaSuccess;
}
API cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int d) {
  if (d) return ret(cudaErrorInvalidDevice);
  memset(p, 0, sizeof *p);
  strcpy(p->name, "NVIDIA H200 (hopper-emu)");
  p->totalGlobalMem = 150754820096ull;
  p->sharedMemPerBlock = 49152;
  p->sharedMemPerBlockOptin = 232448;
  p->sharedMemPerMultiprocessor = 233472;
  p->reservedSharedMemPerBlock = 1024;
  p->regsPerBlock = 65536;
  p->regsPerMultiprocessor = 65536;
  p->warpSize = 32;
  p->memPitch = 2147483647;
  p->maxThreadsPerBlock = 1024;
  p->maxThreadsPerMultiProcessor = 2048;
  p->maxBlocksPerMultiProcessor = 32;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->totalConstMem = 65536;
  p->major = 9;
  p->minor = 0;
  p->textureAlignment = 512;
  p->multiProcessorCount = Options::get().sms;
  p->canMapHostMemory = 1;
  p->concurrentKernels = 1;
  p->unifiedAddressing = 1;
  p->managedMemory = 1;
  p->memoryBusWidth = 6144;
  p->l2CacheSize = 62914560;
  p->asyncEngineCount = 3;
  p->streamPrioritiesSupported = 1;
  p->cooperativeLaunch = 1;
  p->concurrentManagedAccess = 1;
  p->pageableMemoryAccess = 1;
  p->memoryPoolsSupported = 1;
  p->clusterLaunch = 1;
  return cudaSuccess;
}
API cudaError_t cudaDeviceGetAttribute(int* v, cudaDeviceAttr a, int) {
  switch ((int)a) {
    case cudaDevAttrMaxThreadsPerBlock:
      *v = 1024;
      break;
    case cudaDevAttrMaxBlockDimX:
    case cudaDevAttrMaxBlockDimY:
      *v = 1024;
      break;
    case cudaDevAttrMaxBlockDimZ:
      *v = 64;
      break;
    case cudaDevAttrMaxGridDimX:
      *v = 2147483647;
      break;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ:
      *v = 65535;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *v = 49152;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *v = 232448;
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *v = 233472;
      break;
    case cudaDevAttrReservedSharedMemoryPerBlock:
      *v = 1024;
      break;
    case cudaDevAttrTotalConstantMemory:
      *v = 65536;
      break;
    case cudaDevAttrWarpSize:
      *v = 32;
      break;
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor:
      *v = 65536;
      break;
    case cudaDevAttrClockRate:
      *v = 1980000;
      break;
    case cudaDevAttrMemoryClockRate:
      *v = 3201000;
      break;
    case cudaDevAttrGlobalMemoryBusWidth:
      *v = 6144;
      break;
    case cudaDevAttrL2CacheSize:
      *v = 62914560;
      break;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *v = 2048;
      break;
    case cudaDevAttrMultiProcessorCount:
      *v = Options::get().sms;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *v = 9;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *v = 0;
      break;
    case cudaDevAttrMaxBlocksPerMultiprocessor:
      *v = 32;
      break;
    case cudaDevAttrTextureAlignment:
      *v = 512;
      break;
    case cudaDevAttrComputeMode:
    case cudaDevAttrKernelExecTimeout:
    case cudaDevAttrIntegrated:
    case cudaDevAttrEccEnabled:
      *v = 0;
      break;
    default:
      *v = 1;
      break;
  }
  return cudaSuccess;
}
API cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* p, int) {
  *p = (cudaMemPool_t)0x1;
  return cudaSuccess;
}
API cudaError_t cudaDeviceGetMemPool(cudaMemPool_t* p, int) {
  *p = (cudaMemPool_t)0x1;
  return cudaSuccess;
}
API cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, cudaMemPoolAttr, void*) { return cudaSuccess; }
API cudaError_t cudaMemPoolTrimTo(cudaMemPool_t, size_t) { return cudaSuccess; }
API cudaError_t cudaDeviceGetPCIBusId(char* b, int n, int) {
  snprintf(b, (size_t)n, "0000:00:00.0");
  return cudaSuccess;
}
API cudaError_t cudaProfilerStart() { return cudaSuccess; }
API cudaError_t cudaProfilerStop() { return cudaSuccess; }
API cudaError_t cudaCtxResetPersistingL2Cache() { return cudaSuccess; }

// ---------------------------------------------------------------- streams and events (everything executes synchronously)
API cudaError_t cudaStreamCreate(cudaStream_t* s) {
  *s = (cudaStream_t) new int(1);
  return cudaSuccess;
}
API cudaError_t cudaStreamCreateWithFlags(cudaStream_t* s, unsigned) { return cudaStreamCreate(s); }
API cudaError_t cudaStreamCreateWithPriority(cudaStream_t* s, unsigned, int) { return cudaStreamCreate(s); }
API cudaError_t cudaStreamDestroy(cudaStream_t s) {
  delete (int*)s;
  return cudaSuccess;
}
API cudaError_t cudaStreamSynchronize(cudaStream_t) { return sync_state(); }
API cudaError_t cudaStreamQuery(cudaStream_t) { return sync_state(); }
API cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }
API cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* s) {
  *s = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
API cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* s, unsigned long long* id,
                                         cudaGraph_t* g, const cudaGraphNode_t** d, const cudaGraphEdgeData** e,
                                         size_t* n) {
  if (s) *s = cudaStreamCaptureStatusNone;
  if (id) *id = 0;
  if (g) *g = nullptr;
  if (d) *d = nullptr;
  if (e) *e = nullptr;
  if (n) *n = 0;
  return cudaSuccess;
}
API cudaError_t cudaStreamGetFlags(cudaStream_t, unsigned* f) {
  *f = 0;
  return cudaSuccess;
}
API cudaError_t cudaStreamGetPriority(cudaStream_t, int* p) {
  *p = 0;
  return cudaSuccess;
}
API cudaError_t cudaStreamGetDevice(cudaStream_t, int* d) {
  *d = 0;
  return cudaSuccess;
}
API cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t f, void* u) {
  f(u);
  return cudaSuccess;
}
API cudaError_t cudaStreamAddCallback(cudaStream_t s, cudaStreamCallback_t f, void* u, unsigned) {
  f(s, sync_state(), u);
  return cudaSuccess;
}
API cudaError_t cudaDeviceSynchronize() { return sync_state(); }
API cudaError_t cudaEventCreate(cudaEvent_t* e) {
  *e = (cudaEvent_t) new Event();
  return cudaSuccess;
}
API cudaError_t cudaEventCreateWithFlags(cudaEvent_t* e, unsigned) { return cudaEventCreate(e); }
API cudaError_t cudaEventDestroy(cudaEvent_t e) {
  delete (Event*)e;
  return cudaSuccess;
}
API cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t) {
  ((Event*)e)->t = now();
  return sync_state();
}
API cudaError_t cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t, unsigned) {
  ((Event*)e)->t = now();
  return sync_state();
}
API cudaError_t cudaEventSynchronize(cudaEvent_t) { return sync_state(); }
API cudaError_t cudaEventQuery(cudaEvent_t) { return sync_state(); }
API cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t a, cudaEvent_t b) {
  *ms = (float)((((Event*)b)->t - ((Event*)a)->t) * 1e3);
  return sync_state();
}

// ---------------------------------------------------------------- errors
API cudaError_t cudaGetLastError() {
  auto e = S_().last;
  S_().last = S_().sticky;
  return e;
}
API cudaError_t cudaPeekAtLastError() { return S_().last; }
static const std::pair<int, std::pair<const char*, const char*>> kErr[] = {
    {0, {"cudaSuccess", "no error"}},
    {1, {"cudaErrorInvalidValue", "invalid argument"}},
    {2, {"cudaErrorMemoryAllocation", "out of memory"}},
    {9, {"cudaErrorInvalidConfiguration", "invalid configuration argument"}},
    {13, {"cudaErrorInvalidSymbol", "invalid device symbol"}},
    {52, {"cudaErrorMissingConfiguration", "__global__ function call is not configured"}},
    {98, {"cudaErrorInvalidDeviceFunction", "invalid device function"}},
    {101, {"cudaErrorInvalidDevice", "invalid device ordinal"}},
    {209, {"cudaErrorNoKernelImageForDevice", "no kernel image is available for execution on the device"}},
    {500, {"cudaErrorSymbolNotFound", "named symbol not found"}},
    {700, {"cudaErrorIllegalAddress", "an illegal memory access was encountered"}},
    {701, {"cudaErrorLaunchOutOfResources", "too many resources requested for launch"}},
    {702, {"cudaErrorLaunchTimeout", "the launch timed out and was terminated"}},
    {710, {"cudaErrorAssert", "device-side assert triggered"}},
    {715, {"cudaErrorIllegalInstruction", "an illegal instruction was encountered"}},
    {716, {"cudaErrorMisalignedAddress", "misaligned address"}},
    {719, {"cudaErrorLaunchFailure", "unspecified launch failure"}},
    {801, {"cudaErrorNotSupported", "operation not supported"}},
    {912, {"cudaErrorInvalidClusterSize", "invalid cluster size"}},
    {999, {"cudaErrorUnknown", "unknown error"}}};
API const char* cudaGetErrorString(cudaError_t e) {
  for (auto& k : kErr)
    if (k.first == (int)e) return k.second.second;
  return "unrecognized error code";
}
API const char* cudaGetErrorName(cudaError_t e) {
  for (auto& k : kErr)
    if (k.first == (int)e) return k.second.first;
  return "cudaErrorUnrecognized";
}
