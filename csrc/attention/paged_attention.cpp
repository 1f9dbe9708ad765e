// paged_attention: schema and CPU implementation.
//
// The rows of one task, query tokens times the query heads of one KV head, share every key and
// value that they load. Keys come in tiles and tiles in splits, which begin at multiples of
// kTileKeys and kSplitKeys wherever the first visible key is. Every split is an online softmax of
// its own, merged in the order of keys: a row's result depends neither on the rows beside it, nor
// on the batch, nor on which threads took its splits, to the bit.
#include "attention/paged_attention.h"

#include <algorithm>
#include <atomic>
#include <tuple>
#include <vector>

#include "attention/paged_attention_cpu.h"
#include "common/cpu_isa.h"
#include "common/dispatch.h"
#include "common/torch.h"

namespace effllm {

AttentionKernels select_attention_kernels(const PagedAttentionParams& params) {
  if constexpr (kHasX86Isas) {
    if (cpu_isa() >= CpuIsa::kAvx512Bf16 && params.dtype == DType::kBFloat16) {
      return attention_kernels_avx512bf16(params.kv_dtype);
    }
    if (cpu_isa() >= CpuIsa::kAvx512) return attention_kernels_avx512(params.kv_dtype);
    if (cpu_isa() == CpuIsa::kAvx2) return attention_kernels_avx2(params.kv_dtype);
  }
  return attention_kernels<4>(params.kv_dtype);
}

namespace {

constexpr int64_t kTasksPerThread = 4;  // with fewer, threads share tasks

// A thread for each task.
template <class T>
void run_tasks(const AttentionCall& call, const std::vector<Task>& tasks) {
  const auto run = [&](int64_t idx, float* memory) {
    AttentionWorkspace work(memory, call.dim);
    const Task& task = tasks[idx];
    call.load_queries<T>(task, work);
    RowStates whole(work.whole, task.num_rows, call.dim);
    RowStates split(work.split, task.num_rows, call.dim);
    whole.clear();
    for (int64_t part = 0; part < task.num_splits(); ++part) {
      call.attend(task, task.split(part), work, split);
      whole.merge(split);
    }
    call.store_rows<T>(task, whole);
  };
  share_out(TorchThreads(), tasks.size(), AttentionWorkspace::size(call.dim), run);
}

// A thread for each split; the one that finishes a task merges its splits.
template <class T>
void run_splits(const AttentionCall& call, const std::vector<Task>& tasks) {
  struct Split {
    int64_t task, idx, state;  // where its RowStates lie
  };
  std::vector<Split> splits;
  std::vector<std::atomic<int64_t>> unfinished(tasks.size());
  int64_t num_floats = 0;
  for (size_t task = 0; task < tasks.size(); ++task) {
    unfinished[task] = tasks[task].num_splits();
    for (int64_t idx = 0; idx < tasks[task].num_splits(); ++idx) {
      splits.push_back({static_cast<int64_t>(task), idx, num_floats});
      num_floats += RowStates::size(tasks[task].num_rows, call.dim);
    }
  }
  std::vector<float> states(num_floats);
  const auto run = [&](int64_t idx, float* memory) {
    AttentionWorkspace work(memory, call.dim);
    const Split& split = splits[idx];
    const Task& task = tasks[split.task];
    const auto states_of = [&](int64_t part) {
      const int64_t size = RowStates::size(task.num_rows, call.dim);
      return RowStates(states.data() + split.state + (part - split.idx) * size, task.num_rows,
                       call.dim);
    };
    call.load_queries<T>(task, work);
    RowStates own = states_of(split.idx);
    call.attend(task, task.split(split.idx), work, own);
    if (--unfinished[split.task] > 0) return;
    RowStates whole(work.whole, task.num_rows, call.dim);
    whole.clear();
    for (int64_t part = 0; part < task.num_splits(); ++part) whole.merge(states_of(part));
    call.store_rows<T>(task, whole);
  };
  share_out(TorchThreads(), splits.size(), AttentionWorkspace::size(call.dim), run);
}

template <class T>
void run_rows(const PagedAttentionParams& params) {
  // Query tokens past the last sequence: rows without keys.
  const int64_t num_rows = params.num_tokens * params.num_q_heads;
  const int64_t first_unused = params.cu_seqlens_q[params.num_seqs] * params.num_q_heads;
  std::fill(static_cast<T*>(params.out) + first_unused * params.head_dim,
            static_cast<T*>(params.out) + num_rows * params.head_dim, T{});
  std::fill(params.lse + first_unused, params.lse + num_rows, -kInfinity);

  const AttentionCall call(params);
  const std::vector<Task> tasks = make_tasks(params);
  const int64_t enough = kTasksPerThread * torch::stable::get_num_threads();
  if (static_cast<int64_t>(tasks.size()) >= enough) {
    run_tasks<T>(call, tasks);
  } else {
    run_splits<T>(call, tasks);
  }
}

}  // namespace

void run_paged_attention(const PagedAttentionParams& params) {
  if (params.num_tokens == 0 || params.num_q_heads == 0) return;
  dispatch_float(params.dtype, [&](auto element) { run_rows<decltype(element)>(params); });
}

namespace {

std::tuple<Tensor, Tensor> paged_attention_cpu(
    const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& page_table,
    const Tensor& seq_lens, const Tensor& cu_seqlens_q, const std::optional<Tensor>& k_scale,
    const std::optional<Tensor>& v_scale, const std::optional<Tensor>& sinks,
    const std::optional<Tensor>& alibi_slopes, const std::optional<Tensor>& tree_mask,
    int64_t max_seqlen_q, std::optional<double> scale, bool causal, std::optional<int64_t> window,
    double softcap, std::optional<int64_t> split_size, int64_t sink_tokens) {
  PagedAttentionParams params = check_paged_attention(
      as_view(q, "q"), as_view(k_cache, "k_cache"), as_view(v_cache, "v_cache"),
      as_view(page_table, "page_table"), as_view(seq_lens, "seq_lens"),
      as_view(cu_seqlens_q, "cu_seqlens_q"), as_view(k_scale, "k_scale"),
      as_view(v_scale, "v_scale"), as_view(sinks, "sinks"), as_view(alibi_slopes, "alibi_slopes"),
      as_view(tree_mask, "tree_mask"), max_seqlen_q, scale, causal, window, softcap, split_size,
      sink_tokens);
  check_values("paged_attention", params);

  Tensor out = new_empty(q, {params.num_tokens, params.num_q_heads, params.head_dim}, params.dtype);
  Tensor lse = new_empty(q, {params.num_tokens, params.num_q_heads}, DType::kFloat32);
  params.out = out.mutable_data_ptr();
  params.lse = static_cast<float*>(lse.mutable_data_ptr());
  run_paged_attention(params);
  return {out, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(EFFLLM_NS, m) {
  m.def(
      "paged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor page_table, "
      "Tensor seq_lens, Tensor cu_seqlens_q, Tensor? k_scale=None, Tensor? v_scale=None, "
      "Tensor? sinks=None, Tensor? alibi_slopes=None, Tensor? tree_mask=None, *, "
      "SymInt max_seqlen_q, float? scale=None, bool causal=True, int? window=None, "
      "float softcap=0., int? split_size=None, int sink_tokens=0) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NS, CPU, m) {
  m.impl("paged_attention", TORCH_BOX(&paged_attention_cpu));
}

}  // namespace effllm
