// Thread block clusters (sm_90): barrier, and use of each other's shared memory. Earlier GPUs know
// none: what says so takes a CTA there for a cluster of its own.
#pragma once

#include <cstdint>

#include "ptx/mbarrier.cuh"

namespace effllm::ptx {

// CTAs in the cluster; before sm_90, 1.
__device__ __forceinline__ uint32_t cluster_size() {
  uint32_t size = 1;
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
#endif
  return size;
}

// Of this CTA among them; before sm_90, 0.
__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank = 0;
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}

// All threads of all CTAs of the cluster; writes to shared memory before it are seen after it.
// Before sm_90, those of the CTA.
__device__ __forceinline__ void cluster_sync() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
#else
  __syncthreads();
#endif
}

// What CTA `rank` has where this one has `own` in shared memory, to read, write or count in; before
// sm_90, `own`.
template <class T>
__device__ __forceinline__ T* cluster_peer(T* own, uint32_t rank) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  uint64_t address;
  asm("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(own), "r"(rank));
  return reinterpret_cast<T*>(address);
#else
  return own;
#endif
}

// The two halves of a barrier for those who read from each other's shared memory: `arrive` when
// this CTA has its values, `wait` before it overwrites its own or exits.
__device__ __forceinline__ void cluster_arrive_relaxed() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
#endif
}

// The same, but no write before it need be seen after it. Reads are over, as the values are there.
__device__ __forceinline__ void cluster_sync_relaxed() {
  asm volatile(
      "barrier.cluster.arrive.relaxed.aligned;\n"
      "barrier.cluster.wait.aligned;" ::
          : "memory");
}

// Arrives at the barrier that CTA `rank` has where this CTA has `barrier`. Says nothing about this
// thread's writes: released to the whole cluster they would cost a fence of the GPU.
__device__ __forceinline__ void mbarrier_arrive_cluster(uint32_t barrier, uint32_t rank) {
  asm volatile(
      "{.reg .b32 address;\n"
      "mapa.shared::cluster.u32 address, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [address];}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}

// What CTA `rank` has where this CTA has `pointer`.
__device__ __forceinline__ float load_cluster_smem(const float* pointer, uint32_t rank) {
  float value;
  asm volatile(
      "{.reg .b32 address;\n"
      "mapa.shared::cluster.u32 address, %1, %2;\n"
      "ld.shared::cluster.f32 %0, [address];}"
      : "=f"(value)
      : "r"(smem_address(pointer)), "r"(rank)
      : "memory");
  return value;
}

// Puts a value where CTA `rank` has what is `smem` in this one, and counts its bytes on the barrier
// that is `barrier` there.
__device__ __forceinline__ void store_async_cluster(void* smem, uint64_t* barrier, uint32_t rank,
                                                    const float4& value) {
  asm volatile(
      "{.reg .b32 address, barrier;\n"
      "mapa.shared::cluster.u32 address, %0, %2;\n"
      "mapa.shared::cluster.u32 barrier, %1, %2;\n"
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 "
      "[address], {%3, %4, %5, %6}, [barrier];}" ::"r"(smem_address(smem)),
      "r"(smem_address(barrier)), "r"(rank), "f"(value.x), "f"(value.y), "f"(value.z), "f"(value.w)
      : "memory");
}

__device__ __forceinline__ void store_async_cluster(void* smem, uint64_t* barrier, uint32_t rank,
                                                    const int4& value) {
  asm volatile(
      "{.reg .b32 address, barrier;\n"
      "mapa.shared::cluster.u32 address, %0, %2;\n"
      "mapa.shared::cluster.u32 barrier, %1, %2;\n"
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.s32 "
      "[address], {%3, %4, %5, %6}, [barrier];}" ::"r"(smem_address(smem)),
      "r"(smem_address(barrier)), "r"(rank), "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w)
      : "memory");
}

}  // namespace effllm::ptx
