// The Python module effllm._host. Documentation and types are in python/effllm/_host.pyi.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "block_pool.h"
#include "token_tree.h"

namespace py = pybind11;
using effllm::BlockPool;
using effllm::NodeId;
using effllm::OutOfPages;
using effllm::PageId;
using effllm::Token;
using effllm::TokenTree;
using Pages = std::vector<PageId>;
using Tokens = std::vector<Token>;
using Nodes = std::vector<NodeId>;

namespace {

void bind_block_pool(py::module_& module) {
  // Made by hand: py::register_exception would carry the text only, not the numbers.
  static py::handle out_of_pages =
      py::exception<OutOfPages>(module, "OutOfPages", PyExc_RuntimeError).release();
  py::register_exception_translator([](std::exception_ptr thrown) {
    try {
      if (thrown) std::rethrow_exception(thrown);
    } catch (const OutOfPages& error) {
      py::object instance = out_of_pages(error.what());
      instance.attr("found") = error.found;
      instance.attr("needed") = error.needed;
      PyErr_SetObject(out_of_pages.ptr(), instance.ptr());
    }
  });

  py::class_<BlockPool>(module, "BlockPool")
      .def(py::init<int64_t, int64_t, int>(), py::arg("num_pages"), py::arg("page_size"),
           py::arg("hash_bits") = 64)
      .def_property_readonly("num_pages", &BlockPool::num_pages)
      .def_property_readonly("page_size", &BlockPool::page_size)
      .def_property_readonly("num_free", &BlockPool::num_free)
      .def_property_readonly("num_committed", &BlockPool::num_committed)
      .def("ref_count", &BlockPool::ref_count, py::arg("page"))
      .def("is_committed", &BlockPool::is_committed, py::arg("page"))
      .def("allocate", &BlockPool::allocate, py::arg("count"))
      .def(
          "retain", [](BlockPool& pool, const Pages& pages) { pool.retain(pages); },
          py::arg("pages"))
      .def(
          "release", [](BlockPool& pool, const Pages& pages) { pool.release(pages); },
          py::arg("pages"))
      .def(
          "match_prefix",
          [](BlockPool& pool, const Tokens& tokens, std::string_view salt) {
            return pool.match_prefix(tokens, salt);
          },
          py::arg("tokens"), py::arg("salt") = py::bytes())
      .def(
          "commit",
          [](BlockPool& pool, PageId page, const Tokens& tokens, PageId parent,
             std::string_view salt) { pool.commit(page, tokens, parent, salt); },
          py::arg("page"), py::arg("tokens"), py::arg("parent") = 0, py::arg("salt") = py::bytes())
      .def("reset", &BlockPool::reset);
}

void bind_token_tree(py::module_& module) {
  py::class_<TokenTree>(module, "TokenTree")
      .def(py::init([](const Tokens& tokens, const Nodes& parents) {
             return TokenTree(tokens, parents);
           }),
           py::arg("tokens"), py::arg("parents"))
      .def_static(
          "chain", [](const Tokens& tokens) { return TokenTree::chain(tokens); }, py::arg("tokens"))
      .def_static("from_choices", &TokenTree::from_choices, py::arg("root"), py::arg("choices"),
                  py::arg("candidates"))
      .def_static("best_first", &TokenTree::best_first, py::arg("root"), py::arg("candidates"),
                  py::arg("probs"), py::arg("max_nodes") = TokenTree::kMaxNodes)
      .def_static(
          "most_likely",
          [](const Tokens& tokens, const Nodes& parents, const std::vector<double>& probs,
             int64_t max_nodes) {
            return TokenTree::most_likely(tokens, parents, probs, max_nodes);
          },
          py::arg("tokens"), py::arg("parents"), py::arg("probs"),
          py::arg("max_nodes") = TokenTree::kMaxNodes)
      .def_static(
          "prompt_lookup",
          [](const Tokens& context, int64_t max_ngram, int64_t max_draft, int64_t max_nodes) {
            return TokenTree::prompt_lookup(context, max_ngram, max_draft, max_nodes);
          },
          py::arg("context"), py::arg("max_ngram"), py::arg("max_draft"),
          py::arg("max_nodes") = TokenTree::kMaxNodes)
      .def("__len__", &TokenTree::num_nodes)
      .def_property_readonly("tokens", &TokenTree::tokens)
      .def_property_readonly("parents", &TokenTree::parents)
      .def_property_readonly("depths", &TokenTree::depths)
      .def_property_readonly("first_child", &TokenTree::first_child)
      .def_property_readonly("next_sibling", &TokenTree::next_sibling)
      .def_property_readonly("mask_bits", &TokenTree::mask_bits);
}

}  // namespace

PYBIND11_MODULE(_host, module) {
  bind_block_pool(module);
  bind_token_tree(module);
}
