// Reference-counted pages of a paged KV cache, with reuse of equal prefixes.
//
// A page is held (refs >= 1) or free (on the free list). A held, full page may be committed: it
// then has a prefix id that stands for its tokens and everything before them, and is found through
// them, even when free, until it is handed out again.
//
//   free list:  [not committed] [committed, least recently released first]
//               ^ allocate() takes here              release() appends here ^
//
// Every public verb either does all of its work or throws and leaves the pool as it was.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "token.h"

namespace effllm {

using PageId = int32_t;

// Fewer pages are free than were asked for.
struct OutOfPages : std::runtime_error {
  OutOfPages(int64_t found, int64_t needed);
  int64_t found;
  int64_t needed;
};

class BlockPool {
 public:
  // Page 0 is reserved for padding rows. `hash_bits` < 64 truncates the hash, to force collisions.
  BlockPool(int64_t num_pages, int64_t page_size, int hash_bits);

  int64_t num_pages() const { return std::ssize(pages_); }
  int64_t page_size() const { return page_size_; }
  int64_t num_free() const { return num_free_; }
  int64_t num_committed() const { return std::ssize(index_); }
  int64_t ref_count(PageId page) const { return pages_[in_range(page, "ref_count")].refs; }
  bool is_committed(PageId page) const { return pages_[in_range(page, "is_committed")].prefix; }

  std::vector<PageId> allocate(int64_t count);
  void retain(std::span<const PageId> pages);
  void release(std::span<const PageId> pages);
  std::vector<PageId> match_prefix(std::span<const Token> tokens, std::string_view salt);
  void commit(PageId page, std::span<const Token> tokens, PageId parent, std::string_view salt);
  void reset();

 private:
  // Identifies the content of a page and of all pages before it. Ids are never reused, so a child
  // cannot match below a page that took over its parent's number. 0: not committed, or no parent.
  using PrefixId = uint64_t;

  static constexpr PageId kUnlinked = -1;

  struct Key {
    PrefixId parent;
    std::span<const Token> tokens;
    std::string_view salt;

    bool operator==(const Key& other) const {
      return parent == other.parent && salt == other.salt &&
             std::ranges::equal(tokens, other.tokens);
    }
  };

  struct Page {
    int64_t refs = 0;
    PageId prev = kUnlinked, next = kUnlinked;  // free list
    PrefixId prefix = 0;
    PrefixId parent = 0;  // from here on: the key, meaningful while prefix != 0
    std::vector<Token> tokens;
    std::string salt;
  };

  PageId in_range(PageId page, const char* verb) const;
  PageId held(PageId page, const char* verb) const;
  uint64_t hash(const Key& key) const;
  Key key_of(PageId page) const;
  PageId find(const Key& key) const;
  void forget(PageId page);
  void link_before(PageId page, PageId next);
  void unlink(PageId page);

  int64_t page_size_;
  uint64_t hash_mask_;
  int64_t num_free_ = 0;
  PrefixId next_prefix_ = 1;
  std::vector<Page> pages_;  // pages_[0], which nobody holds, is the free list's sentinel
  std::unordered_multimap<uint64_t, PageId> index_;  // several pages may hold equal content
};

}  // namespace effllm
