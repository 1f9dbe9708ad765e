// Paged attention for many query rows: prefill, chunked prefill and mixed batches, on mma.sync.
//
// Roofline: arithmetic. A CTA takes 128 packed rows (query, head in group) of one (sequence, KV
// head) and does 4 * 128 * D operations for each key's 4 * D bytes, which all row tiles but the
// first find in L2. mma.sync reaches about 60 % of the tensor rate of an H100.
//
//   shared memory; a chunk is 16 bytes, the page table says where a key's row comes from
//
//          chunk 0 1 2 .. D/8
//     q    row 0 [ . . . . ]      warp w owns rows 32w .. 32w + 31:
//     k    key 0 [ . . . . ]        S[32, N] = Q[32, D] K[N, D]^T     fragments by ldmatrix
//     v    key 0 [ . . . . ]        P = 2^(S - maximum)               in registers
//                                   O[32, D] += P[32, N] V[N, D]      fragments by ldmatrix.trans
//
//   Chunk c of row r lies at c ^ (r % 8), so that the eight rows of an ldmatrix hit all banks.
//   While S is computed V arrives, while O is computed the next K arrives (one buffer each).
//
// Rows of quantised caches arrive in registers; their codes, exact as Elements, go on to shared
// memory. The scales of K meet the scores, those of V the weights, as in decode_kv.cuh.
#pragma once

#include <climits>
#include <cstddef>
#include <cstdint>
#include <string>
#include <type_traits>

#include "attention/online_softmax.cuh"
#include "attention/paged_prefill_storage.cuh"
#include "attention/paged_sequence.cuh"
#include "attention/value_exponent.cuh"
#include "common/math.h"
#include "cuda/launch.h"
#include "ptx/cp_async.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/load.cuh"
#include "ptx/mma.cuh"
#include "quant/dequant.cuh"

namespace effllm {

template <class Config>
class PagedPrefill {
  using Element = typename Config::Element;
  using Storage = PagedPrefillStorage<Config>;
  static constexpr int kKeyTiles = Config::kBlockN / 8;
  static constexpr int kDimTiles = Config::kHeadDim / 8;
  static constexpr int kDimSteps = Config::kHeadDim / 16;
  static constexpr int kRowTiles = Config::kRowTiles;
  using Octet = KvOctet<typename Config::Kv>;
  // Of a tile of K or V: a thread copies chunk threadIdx.x % kChunks of every kRowsPerPass-th row.
  static constexpr int kRowsPerPass = Config::kThreads / Config::kChunks;
  static constexpr int kPasses = Config::kBlockN / kRowsPerPass;
  using Scores = float[kRowTiles][kKeyTiles][4];

 public:
  __device__ __forceinline__ PagedPrefill(const PagedAttentionArgs& args, Storage& smem,
                                          int table_idx, int head, int first_row)
      : args_(args),
        smem_(smem),
        sequence_(args, table_idx),
        kv_head_(sequence_.first_kv_head + head),
        first_row_(first_row),
        num_rows_(sequence_.is_taken(args) ? sequence_.num_queries * args.group : 0),
        warp_row_(threadIdx.x / 32 * Config::kWarpRows),
        lane_idx_(threadIdx.x % 32) {
    if (first_row == 0 && sequence_.is_taken(args))
      clear_unowned_tokens<Element>(args, sequence_, kv_head_);
  }

  __device__ __forceinline__ bool has_rows() const { return first_row_ < num_rows_; }

  __device__ __forceinline__ void run() {
    prologue();
    for (int tile = 0; tile < num_tiles_; ++tile) {
      const bool more = tile + 1 < num_tiles_;
      finish_load(smem_.k, smem_.k_word[tile % 2]);
      __syncthreads();  // this K is there; every warp is done with the last V
      begin_load(smem_.v, args_.v_cache, smem_.v_offset[tile % 2]);
      if (more) locate_tile(tile + 1);
      Scores scores = {};
      if (warp_has_rows()) compute_scores(scores);
      finish_load(smem_.v, smem_.v_word[tile % 2]);
      __syncthreads();  // this V is there, so are the next offsets; every warp is done with this K
      if (more) begin_load(smem_.k, args_.k_cache, smem_.k_offset[(tile + 1) % 2]);
      if (warp_has_rows()) {
        softmax(scores, tile);
        accumulate_output(scores);
      }
    }
    if (warp_has_rows()) epilogue();
  }

 private:
  __device__ __forceinline__ bool warp_has_rows() const {
    return first_row_ + warp_row_ < num_rows_;
  }

  __device__ __forceinline__ int query_of_row(int row) const {
    return static_cast<int>(args_.group_divisor.quotient(row));
  }

  // The keys that a row of the CTA sees. Rows past the last, whose results are not stored, go along
  // with it.
  __device__ __forceinline__ KeyRange visible_keys_of_row(int row) const {
    return sequence_.visible_keys(args_, query_of_row(min(first_row_ + row, num_rows_ - 1)));
  }

  // Queries and the first K; the keys that some row of the CTA, and that all rows of the warp see.
  __device__ __forceinline__ void prologue() {
    keys_ = {visible_keys_of_row(0).begin, visible_keys_of_row(Config::kBlockM - 1).end};
    // Tiles of the head come first.
    head_end_ = min(args_.sink_tokens, keys_.end);
    keys_.begin = max(keys_.begin, head_end_);
    num_head_tiles_ = ceil_div(head_end_, Config::kBlockN);
    num_tiles_ = num_head_tiles_ + ceil_div(keys_.end - keys_.begin, Config::kBlockN);
    common_keys_ = {visible_keys_of_row(warp_row_ + Config::kWarpRows - 1).begin,
                    visible_keys_of_row(warp_row_).end};
    load_queries();
    locate_tile(0);
    locate_biases();
    __syncthreads();  // the offsets are there
    begin_load(smem_.k, args_.k_cache, smem_.k_offset[0]);
    ptx::cp_async_wait<0>();
    __syncthreads();  // the queries are there
  }

  __device__ __forceinline__ void load_queries() {
    const auto* q = static_cast<const Element*>(args_.q);
    const int dim_chunks = static_cast<int>(args_.head_dim) / 8;
    for (int i = threadIdx.x; i < Config::kBlockM * Config::kChunks; i += Config::kThreads) {
      const int row = i / Config::kChunks, chunk = i % Config::kChunks;
      const bool valid = first_row_ + row < num_rows_ && chunk < dim_chunks;
      const Element* src = q;
      if (valid) {
        const int query_idx = query_of_row(first_row_ + row);
        const int head = kv_head_ * args_.group + first_row_ + row - query_idx * args_.group;
        src += (sequence_.first_token + query_idx) * args_.stride_q_token +
               head * args_.stride_q_head + chunk * 8;
      }
      ptx::cp_async_16(&smem_.q[row][swizzled_chunk(row, chunk)], src, valid);
    }
  }

  // What the scores of each row get besides. Rows past the last go along with it.
  __device__ __forceinline__ void locate_biases() {
    static_assert(Config::kBlockM <= Config::kThreads);
    if (threadIdx.x >= Config::kBlockM) return;
    const int row = min(first_row_ + static_cast<int>(threadIdx.x), num_rows_ - 1);
    const OutputRow out_row(args_, sequence_, kv_head_, row);
    smem_.sink[threadIdx.x] = sink_score(args_, out_row.head);
    if (args_.alibi_slopes != nullptr) {
      smem_.alibi[threadIdx.x] = AlibiRow::of(args_, sequence_, kv_head_, row);
    }
  }

  __device__ __forceinline__ int first_key_of(int tile) const {
    return tile < num_head_tiles_ ? tile * Config::kBlockN
                                  : keys_.begin + (tile - num_head_tiles_) * Config::kBlockN;
  }

  // One thread per key looks into the page table, for all threads that will copy its rows. Keys
  // outside keys_ are neither looked up nor read: their slots may hold anything, NaN too.
  __device__ __forceinline__ void locate_tile(int tile) {
    if (threadIdx.x >= Config::kBlockN) return;
    const int key = first_key_of(tile) + threadIdx.x;
    const int end = tile < num_head_tiles_ ? head_end_ : keys_.end;
    int64_t k_offset = Storage::kNoKey, v_offset = Storage::kNoKey;
    uint32_t k_word = 0, v_word = 0;
    if (key < end) {
      const KeyLocation location = locate_key(args_, sequence_.page_row, key);
      k_offset = location.k_offset(args_, kv_head_);
      v_offset = location.v_offset(args_, kv_head_);
      if constexpr (Config::kQuantized) {
        k_word = location.word(args_.k_scales, kv_head_);
        v_word = location.word(args_.v_scales, kv_head_);
      }
    }
    if constexpr (Config::kQuantized) {
      smem_.k_word[tile % 2][threadIdx.x] = k_word;
      smem_.v_word[tile % 2][threadIdx.x] = v_word;
    }
    smem_.k_offset[tile % 2][threadIdx.x] = k_offset;
    smem_.v_offset[tile % 2][threadIdx.x] = v_offset;
  }

  // Zeros where there is no key: a weight of 0 does not silence a NaN in V.
  __device__ __forceinline__ void begin_load(uint4 (&tile)[Config::kBlockN][Config::kChunks],
                                             const void* cache, const int64_t* offsets) {
    const int dim_chunks = static_cast<int>(args_.head_dim) / 8;
    const int chunk = threadIdx.x % Config::kChunks;
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const int row = pass * kRowsPerPass + threadIdx.x / Config::kChunks;
      const int64_t offset = offsets[row];
      const bool valid = offset != Storage::kNoKey && chunk < dim_chunks;
      if constexpr (Config::kQuantized) {
        constexpr int kBytes = Octet::kWords * 4;
        const char* src = static_cast<const char*>(cache) + offset + chunk * kBytes;
#pragma unroll
        for (uint32_t& word : codes_[pass]) word = 0;
        if (valid) ptx::load_streaming<Octet::kWords>(codes_[pass], src);
      } else {
        const auto* src = static_cast<const Element*>(cache) + (valid ? offset + chunk * 8 : 0);
        ptx::cp_async_16(&tile[row][swizzled_chunk(row, chunk)], src, valid);
      }
    }
    ptx::cp_async_commit();
  }

  // Of a tile that nobody reads any more. It is there after the next barrier.
  __device__ __forceinline__ void finish_load(uint4 (&tile)[Config::kBlockN][Config::kChunks],
                                              const uint32_t* words) {
    if constexpr (Config::kQuantized) {
      const int chunk = threadIdx.x % Config::kChunks;
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) {
        const int row = pass * kRowsPerPass + threadIdx.x / Config::kChunks;
        uint32_t pairs[4];
        Octet::decode(codes_[pass], Octet::bias(words[row]), pairs);
        tile[row][swizzled_chunk(row, chunk)] = as_elements(pairs);
      }
    } else {
      ptx::cp_async_wait<0>();
    }
  }

  // Pairs of float16 as 8 Elements in their order.
  static __device__ __forceinline__ uint4 as_elements(const uint32_t (&pairs)[4]) {
    float x[8];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = __half22float2(reinterpret_cast<const __half2&>(pairs[i]));
      const int d = Octet::kPairDistance == 1 ? 2 * i : i;
      x[d] = pair.x, x[d + Octet::kPairDistance] = pair.y;
    }
    return {ptx::pack_pair<Element>(x[0], x[1]), ptx::pack_pair<Element>(x[2], x[3]),
            ptx::pack_pair<Element>(x[4], x[5]), ptx::pack_pair<Element>(x[6], x[7])};
  }

  // What this lane gives to ldmatrix for the 16 x 16 block of chunks 2 chunk_pair and its
  // neighbour: matrices 0 and 1 are its upper and lower left, 2 and 3 its upper and lower right.
  template <int kRows>
  __device__ __forceinline__ const uint4* block_row(const uint4 (&tile)[kRows][Config::kChunks],
                                                    int first_row, int chunk_pair) const {
    const int row = first_row + lane_idx_ % 16;
    return &tile[row][swizzled_chunk(row, chunk_pair * 2 + lane_idx_ / 16)];
  }

  __device__ __forceinline__ void compute_scores(Scores& scores) const {
#pragma unroll
    for (int step = 0; step < kDimSteps; ++step) {
      uint32_t q[kRowTiles][4];
#pragma unroll
      for (int row_tile = 0; row_tile < kRowTiles; ++row_tile) {
        ptx::ldmatrix_x4(q[row_tile], block_row(smem_.q, warp_row_ + row_tile * 16, step));
      }
#pragma unroll
      for (int pair = 0; pair < kKeyTiles / 2; ++pair) {
        // As B fragments: left and right half of keys 0-7 of the pair, then of keys 8-15.
        const int key = pair * 16 + lane_idx_ / 16 * 8 + lane_idx_ % 8;
        const int chunk = step * 2 + lane_idx_ / 8 % 2;
        uint32_t k[4];
        ptx::ldmatrix_x4(k, &smem_.k[key][swizzled_chunk(key, chunk)]);
#pragma unroll
        for (int row_tile = 0; row_tile < kRowTiles; ++row_tile) {
          auto& s = scores[row_tile];
          ptx::mma_m16n8k16<Element>(s[pair * 2], q[row_tile], k[0], k[1]);
          ptx::mma_m16n8k16<Element>(s[pair * 2 + 1], q[row_tile], k[2], k[3]);
        }
      }
    }
  }

  // Scores become weights 2^(x - maximum); output and sums so far are brought to the new maximum.
  __device__ __forceinline__ void softmax(Scores& scores, int tile_idx) {
    const ScoreMap map(args_);
    const int first_key = first_key_of(tile_idx);
    // Most tiles lie inside the range of every row: no comparisons there.
    const bool whole =
        first_key >= common_keys_.begin && first_key + Config::kBlockN <= common_keys_.end;
#pragma unroll
    for (int row_tile = 0; row_tile < kRowTiles; ++row_tile) {
      if constexpr (Config::kQuantized) scale_keys(scores[row_tile], smem_.k_word[tile_idx % 2]);
      map.apply(scores[row_tile]);
      if (args_.alibi_slopes != nullptr) add_biases(scores[row_tile], row_tile, first_key);
      if (!whole) mask(scores[row_tile], row_tile, first_key);
      update_rows(scores[row_tile], row_tile);
    }
    if constexpr (Config::kQuantized) scale_weights(scores, smem_.v_word[tile_idx % 2]);
  }

  // The scale of key `i % 2` of this lane's two of a tile of 8.
  static __device__ __forceinline__ float key_scale(const uint32_t* words, int tile, int i) {
    return Octet::scale(words[tile * 8 + threadIdx.x % 4 * 2 + i % 2]);
  }

  static __device__ __forceinline__ void scale_keys(float (&scores)[kKeyTiles][4],
                                                    const uint32_t* words) {
#pragma unroll
    for (int tile = 0; tile < kKeyTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[tile][i] *= key_scale(words, tile, i);
    }
  }

  __device__ __forceinline__ void scale_weights(Scores& weights, const uint32_t* words) {
    float largest = 0.f, factor;
#pragma unroll
    for (int i = 0; i < kKeyTiles * 2; ++i) {
      largest = fmaxf(largest, fabsf(key_scale(words, i / 2, i)));
    }
    if (value_exponent_.grow(largest, factor)) multiply_output(factor);
#pragma unroll
    for (auto& of_row_tile : weights) {
#pragma unroll
      for (int i = 0; i < kKeyTiles * 4; ++i) {
        of_row_tile[i / 4][i % 4] *= key_scale(words, i / 4, i) * value_exponent_.inverse();
      }
    }
  }

  __device__ __forceinline__ void multiply_output(float factor) {
#pragma unroll
    for (auto& of_row_tile : output_) {
#pragma unroll
      for (int i = 0; i < kDimTiles * 4; ++i) of_row_tile[i / 4][i % 4] *= factor;
    }
  }

  __device__ __forceinline__ void add_biases(float (&scores)[kKeyTiles][4], int row_tile,
                                             int first_key) const {
    const AlibiRow* const alibi = &smem_.alibi[warp_row_ + row_tile * 16 + lane_idx_ / 4];
#pragma unroll
    for (int tile = 0; tile < kKeyTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int key = first_key + tile * 8 + lane_idx_ % 4 * 2 + i % 2;
        scores[tile][i] = alibi[i / 2 * 8].biased(scores[tile][i], key);
      }
    }
  }

  __device__ __forceinline__ void mask(float (&scores)[kKeyTiles][4], int row_tile,
                                       int first_key) const {
    const int row = warp_row_ + row_tile * 16 + lane_idx_ / 4;
    KeyRange visible[2] = {visible_keys_of_row(row), visible_keys_of_row(row + 8)};
    if (first_key < args_.sink_tokens) {
      for (KeyRange& keys : visible) keys = {0, min(keys.end, head_end_)};
    }
#pragma unroll
    for (int tile = 0; tile < kKeyTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int key = first_key + tile * 8 + lane_idx_ % 4 * 2 + i % 2;
        if (!visible[i / 2].contains(key)) scores[tile][i] = kMaskedScore;
      }
    }
  }

  __device__ __forceinline__ void update_rows(float (&scores)[kKeyTiles][4], int row_tile) {
    SoftmaxRow(&rows)[2] = rows_[row_tile];
    float maximum[2] = {rows[0].maximum, rows[1].maximum};
#pragma unroll
    for (int tile = 0; tile < kKeyTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) maximum[i / 2] = fmaxf(maximum[i / 2], scores[tile][i]);
    }
    float factor[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // The four lanes of a quad hold the keys of one row.
      maximum[half] = fmaxf(maximum[half], __shfl_xor_sync(~0u, maximum[half], 1));
      maximum[half] = fmaxf(maximum[half], __shfl_xor_sync(~0u, maximum[half], 2));
      factor[half] = ptx::exp2_approx(rows[half].maximum - maximum[half]);
      rows[half].maximum = maximum[half];
      rows[half].sum *= factor[half];
    }
#pragma unroll
    for (int tile = 0; tile < kDimTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) output_[row_tile][tile][i] *= factor[i / 2];
    }
#pragma unroll
    for (int tile = 0; tile < kKeyTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        scores[tile][i] = ptx::exp2_approx(scores[tile][i] - maximum[i / 2]);
        rows[i / 2].sum += scores[tile][i];
      }
    }
  }

  __device__ __forceinline__ void accumulate_output(const Scores& weights) {
#pragma unroll
    for (int step = 0; step < Config::kBlockN / 16; ++step) {
      uint32_t p[kRowTiles][4];
#pragma unroll
      for (int row_tile = 0; row_tile < kRowTiles; ++row_tile) {
        // Two accumulator tiles side by side are one A fragment.
        const auto& left = weights[row_tile][step * 2];
        const auto& right = weights[row_tile][step * 2 + 1];
        p[row_tile][0] = ptx::pack_pair<Element>(left[0], left[1]);
        p[row_tile][1] = ptx::pack_pair<Element>(left[2], left[3]);
        p[row_tile][2] = ptx::pack_pair<Element>(right[0], right[1]);
        p[row_tile][3] = ptx::pack_pair<Element>(right[2], right[3]);
      }
#pragma unroll
      for (int pair = 0; pair < kDimTiles / 2; ++pair) {
        uint32_t v[4];
        ptx::ldmatrix_x4_trans(v, block_row(smem_.v, step * 16, pair));
#pragma unroll
        for (int row_tile = 0; row_tile < kRowTiles; ++row_tile) {
          auto& o = output_[row_tile];
          ptx::mma_m16n8k16<Element>(o[pair * 2], p[row_tile], v[0], v[1]);
          ptx::mma_m16n8k16<Element>(o[pair * 2 + 1], p[row_tile], v[2], v[3]);
        }
      }
    }
  }

  // Divides by the sums and writes the warp's rows through its part of q, 16 bytes per lane.
  __device__ __forceinline__ void epilogue() {
    if constexpr (Config::kQuantized) multiply_output(value_exponent_.factor());
#pragma unroll
    for (int i = 0; i < kRowTiles * 2; ++i) {
      SoftmaxRow& row = rows_[i / 2][i % 2];
      row.sum += __shfl_xor_sync(~0u, row.sum, 1);
      row.sum += __shfl_xor_sync(~0u, row.sum, 2);
      const int row_idx = warp_row_ + i * 8 + lane_idx_ / 4;
      const float inverse = row.inverse_sum(smem_.sink[row_idx]);
#pragma unroll
      for (int tile = 0; tile < kDimTiles; ++tile) {
        auto* chunk = reinterpret_cast<uint32_t*>(&smem_.q[row_idx][swizzled_chunk(row_idx, tile)]);
        const float* pair = &output_[i / 2][tile][i % 2 * 2];
        chunk[lane_idx_ % 4] = ptx::pack_pair<Element>(pair[0] * inverse, pair[1] * inverse);
      }
      if (lane_idx_ % 4 == 0 && first_row_ + row_idx < num_rows_) {
        const OutputRow out_row(args_, sequence_, kv_head_, first_row_ + row_idx);
        args_.lse[out_row.idx] = row.lse2() * kLn2;
      }
    }
    __syncwarp();
    const int dim_chunks = static_cast<int>(args_.head_dim) / 8;
    for (int i = lane_idx_; i < Config::kWarpRows * Config::kChunks; i += 32) {
      const int row_idx = warp_row_ + i / Config::kChunks, chunk = i % Config::kChunks;
      if (first_row_ + row_idx >= num_rows_ || chunk >= dim_chunks) continue;
      const OutputRow out_row(args_, sequence_, kv_head_, first_row_ + row_idx);
      auto* dst = static_cast<Element*>(args_.out) + out_row.idx * args_.head_dim + chunk * 8;
      *reinterpret_cast<uint4*>(dst) = smem_.q[row_idx][swizzled_chunk(row_idx, chunk)];
    }
  }

  const PagedAttentionArgs& args_;
  Storage& smem_;
  const Sequence sequence_;
  const int kv_head_, first_row_, num_rows_, warp_row_, lane_idx_;
  KeyRange keys_, common_keys_;
  int num_tiles_, num_head_tiles_, head_end_;
  // This thread's part of its warp's row tiles: rows lane / 4 and lane / 4 + 8 of each.
  SoftmaxRow rows_[kRowTiles][2];
  float output_[kRowTiles][kDimTiles][4] = {};
  // Of quantised caches: this thread's part of the K or V on its way.
  uint32_t codes_[kPasses][Octet::kWords];
  ValueExponent value_exponent_;
};

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kMinCtasPerSm)
    paged_prefill_kernel(const __grid_constant__ PagedAttentionArgs args) {
  extern __shared__ uint4 smem_raw[];
  auto& smem = *reinterpret_cast<PagedPrefillStorage<Config>*>(smem_raw);
  // Late row tiles come first: under a causal mask they are the longest.
  const auto heads = static_cast<uint32_t>(args.heads_per_table);
  const auto num_tables = static_cast<uint32_t>(args.num_tables);
  const uint32_t pair = blockIdx.x / heads;
  const int row_tile = args.num_row_tiles - 1 - static_cast<int>(pair / num_tables);
  PagedPrefill<Config> prefill(args, smem, pair % num_tables, blockIdx.x % heads,
                               row_tile * Config::kBlockM);
  if (prefill.has_rows()) prefill.run();
}

template <class Config>
void launch_paged_prefill(const PagedAttentionArgs& problem, cudaStream_t stream) {
  PagedAttentionArgs args = problem;
  const int64_t rows = args.group * args.max_seqlen_q;
  args.num_row_tiles = static_cast<int32_t>(ceil_div<int64_t>(rows, Config::kBlockM));
  const int64_t blocks = args.num_row_tiles * args.num_kv_heads * args.num_seqs;
  if (rows > INT_MAX - Config::kBlockM || blocks > INT_MAX) {
    fail("paged_attention",
         "HQ / HKV * max_seqlen_q and the number of tiles must be below 2^31, got " +
             std::to_string(rows) + " and " + std::to_string(blocks));
  }
  const Launch launch{"paged_attention", dim3(static_cast<unsigned>(blocks)),
                      dim3(Config::kThreads), sizeof(PagedPrefillStorage<Config>), stream};
  launch(paged_prefill_kernel<Config>, args);
}

}  // namespace effllm
