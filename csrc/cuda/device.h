// The device vocabulary of the engine: everything that its kernels and launches need from CUDA.
// Under nvcc it is defined here; another compiler takes the definition of the emulator from its include path.
#pragma once

#include <cstddef>
#include <cstdint>

namespace wn::cuda {

// Register-sized pieces of memory: up to 16 bytes, moved by one instruction.
struct alignas(16) Words {
  uint32_t word[4];
};

// What the choice of a path depends on.
struct Device {
  int multiprocessors;
  int capability;        // 10 * major + minor, of the GPU or of the code that it runs, whichever is less
  int64_t shared_bytes;  // that one block can have
  int64_t blocks;        // that one grid can have
};

struct Shape {
  int64_t blocks;
  int threads;
  int cluster;
  int64_t shared_bytes;
};

}  // namespace wn::cuda

#if !defined(__CUDACC__)
#include "simt.h"
#else

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <vector>

#define WN_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)  // per multiprocessor
#define WN_PARAMETER const __grid_constant__
#define WN_DEVICE __device__ __forceinline__
#define WN_OUTLINE __device__ __noinline__

namespace wn::cuda {

WN_DEVICE int tid() { return threadIdx.x; }
WN_DEVICE int block_threads() { return blockDim.x; }
WN_DEVICE int bid() { return blockIdx.x; }

template <class T> WN_DEVICE T shfl_xor(unsigned lanes, T x, int distance) {
  return __shfl_xor_sync(lanes, x, distance);
}
// The same number, as one that the compiler knows nothing of.
WN_DEVICE int64_t opaque(int64_t x) {
  asm volatile("" : "+l"(x));
  return x;
}
// A pointer that the compiler may take as one to global memory, in functions that are not inlined.
WN_DEVICE const void* in_global(const void* pointer) {
  __builtin_assume(__isGlobal(pointer));
  return pointer;
}
WN_DEVICE void block_sync() { __syncthreads(); }
WN_DEVICE bool block_any(bool condition) { return __syncthreads_or(condition); }

// Clusters of blocks; the kernels reach these only where the launch asked for a cluster.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
WN_DEVICE void cluster_sync() {
  __cluster_barrier_arrive();
  __cluster_barrier_wait();
}
WN_DEVICE int cluster_rank() { return __clusterRelativeBlockRank(); }
WN_DEVICE int cluster_size() { return __clusterSizeInBlocks(); }
template <class T> WN_DEVICE T* peer(T* in_shared, int rank) {
  return static_cast<T*>(__cluster_map_shared_rank(in_shared, rank));
}
#else
WN_DEVICE void cluster_sync() {}
WN_DEVICE int cluster_rank() { return 0; }
WN_DEVICE int cluster_size() { return 1; }
template <class T> WN_DEVICE T* peer(T* in_shared, int) { return in_shared; }
#endif

template <class T> WN_DEVICE T* shared() {
  extern __shared__ Words dynamic_shared[];
  return reinterpret_cast<T*>(dynamic_shared);
}

template <int bytes> WN_DEVICE Words load(const void* from) {
  if constexpr (bytes == 16) {
    const uint4 x = *static_cast<const uint4*>(from);
    return {x.x, x.y, x.z, x.w};
  } else {
    static_assert(bytes == 8, "packs have 8 or 16 bytes");
    const uint2 x = *static_cast<const uint2*>(from);
    return {x.x, x.y, 0, 0};
  }
}
template <int bytes> WN_DEVICE void store(void* to, Words x) {
  if constexpr (bytes == 16) {
    *static_cast<uint4*>(to) = make_uint4(x.word[0], x.word[1], x.word[2], x.word[3]);
  } else {
    static_assert(bytes == 8, "packs have 8 or 16 bytes");
    *static_cast<uint2*>(to) = make_uint2(x.word[0], x.word[1]);
  }
}
// The same to global memory; the compiler may take the plain assignment apart.
template <int bytes> WN_DEVICE void store_global(void* to, Words x) {
  if constexpr (bytes == 16) {
    __stwb(static_cast<uint4*>(to), make_uint4(x.word[0], x.word[1], x.word[2], x.word[3]));
  } else {
    static_assert(bytes == 8, "packs have 8 or 16 bytes");
    __stwb(static_cast<uint2*>(to), make_uint2(x.word[0], x.word[1]));
  }
}

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  const std::string prefix = std::string("wnkernels: ") + what + ": ";
  switch (error) {
    case cudaErrorInsufficientDriver:
    case cudaErrorNoDevice:
      throw std::runtime_error(prefix + "no NVIDIA GPU with a driver for CUDA " +
                               std::to_string(CUDART_VERSION / 1000) + " or newer was found");
    case cudaErrorNoKernelImageForDevice:
      throw std::runtime_error(prefix + "not built for this GPU; rebuild with it in TORCH_CUDA_ARCH_LIST");
    default: throw std::runtime_error(prefix + cudaGetErrorString(error));
  }
}

template <int> __global__ void probe() {}

inline Device query_device(int index) {
  const auto attribute = [index](cudaDeviceAttr which) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, index), "asking for a GPU's properties");
    return value;
  };
  const int capability =
      10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor);
  cudaFuncAttributes code{};
  check(cudaFuncGetAttributes(&code, probe<0>), "looking for the kernels of a GPU");
  return {attribute(cudaDevAttrMultiProcessorCount), capability < code.ptxVersion ? capability : code.ptxVersion,
          attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin), attribute(cudaDevAttrMaxGridDimX)};
}

inline const Device& current_device() {
  thread_local std::vector<Device> known;
  int current = 0;
  check(cudaGetDevice(&current), "asking for the current GPU");
  if (static_cast<int>(known.size()) <= current) known.resize(current + 1);
  if (known[current].multiprocessors == 0) known[current] = query_device(current);
  return known[current];
}

template <class... Parameter, class... Argument>
void launch(const char* what, const Shape& shape, void* stream, void (*kernel)(Parameter...),
            const Argument&... argument) {
  constexpr int64_t shared_without_asking = 48 << 10;
  if (shape.shared_bytes > shared_without_asking)
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shape.shared_bytes)),
          what);
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = shape.cluster;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(shape.blocks));
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &cluster;
  config.numAttrs = shape.cluster > 1 ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, argument...), what);
  check(cudaGetLastError(), what);
}

}  // namespace wn::cuda
#endif
