#include "block_pool.h"

#include <algorithm>
#include <limits>
#include <utility>

namespace effllm {

OutOfPages::OutOfPages(int64_t found, int64_t needed)
    : std::runtime_error("BlockPool.allocate: needed " + std::to_string(needed) + " pages, found " +
                         std::to_string(found) + " free"),
      found(found),
      needed(needed) {}

namespace {

std::string at(const char* verb, PageId page) {
  return "BlockPool." + std::string(verb) + ": page " + std::to_string(page);
}

// splitmix64's finaliser: every input bit reaches every output bit.
uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

}  // namespace

BlockPool::BlockPool(int64_t num_pages, int64_t page_size, int hash_bits) : page_size_(page_size) {
  constexpr int64_t kMaxPages = std::numeric_limits<PageId>::max();
  if (num_pages < 2 || num_pages > kMaxPages) {
    throw std::invalid_argument("BlockPool: num_pages must be in [2, " + std::to_string(kMaxPages) +
                                "] (page 0 is reserved), got " + std::to_string(num_pages));
  }
  if (page_size < 1) {
    throw std::invalid_argument("BlockPool: page_size must be at least 1, got " +
                                std::to_string(page_size));
  }
  if (hash_bits < 0 || hash_bits > 64) {
    throw std::invalid_argument("BlockPool: hash_bits must be in [0, 64], got " +
                                std::to_string(hash_bits));
  }
  hash_mask_ = hash_bits == 64 ? ~uint64_t{0} : (uint64_t{1} << hash_bits) - 1;
  pages_.resize(num_pages);
  reset();
}

void BlockPool::reset() {
  index_.clear();
  std::fill(pages_.begin(), pages_.end(), Page{});
  pages_[0].prev = pages_[0].next = 0;
  num_free_ = 0;
  for (PageId page = 1; page < std::ssize(pages_); ++page) link_before(page, 0);
}

std::vector<PageId> BlockPool::allocate(int64_t count) {
  if (count < 0) {
    throw std::invalid_argument("BlockPool.allocate: count must not be negative, got " +
                                std::to_string(count));
  }
  if (count > num_free_) throw OutOfPages(num_free_, count);
  std::vector<PageId> taken(count);
  for (PageId& page : taken) {
    page = pages_[0].next;
    unlink(page);
    if (pages_[page].prefix) forget(page);
    pages_[page].refs = 1;
  }
  return taken;
}

void BlockPool::retain(std::span<const PageId> pages) {
  for (PageId page : pages) held(page, "retain");
  for (PageId page : pages) ++pages_[page].refs;
}

void BlockPool::release(std::span<const PageId> pages) {
  // A page may be listed twice, so holders are counted down while checking, and back on failure.
  size_t done = 0;
  try {
    for (; done < pages.size(); ++done) --pages_[held(pages[done], "release")].refs;
  } catch (...) {
    while (done > 0) ++pages_[pages[--done]].refs;
    throw;
  }
  // Back to front: a page is reused before its predecessors, without which it cannot be found.
  for (size_t i = pages.size(); i-- > 0;) {
    const Page& page = pages_[pages[i]];
    const bool listed_twice = page.next != kUnlinked;
    if (page.refs > 0 || listed_twice) continue;
    link_before(pages[i], page.prefix ? 0 : pages_[0].next);
  }
}

std::vector<PageId> BlockPool::match_prefix(std::span<const Token> tokens, std::string_view salt) {
  std::vector<PageId> matched;
  matched.reserve(tokens.size() / page_size_);
  PrefixId parent = 0;
  for (; std::ssize(tokens) >= page_size_; tokens = tokens.subspan(page_size_)) {
    const PageId page = find({parent, tokens.first(page_size_), salt});
    if (page == 0) break;
    if (pages_[page].refs++ == 0) unlink(page);
    matched.push_back(page);
    parent = pages_[page].prefix;
  }
  return matched;
}

void BlockPool::commit(PageId page, std::span<const Token> tokens, PageId parent,
                       std::string_view salt) {
  held(page, "commit");
  if (std::ssize(tokens) != page_size_) {
    throw std::invalid_argument(at("commit", page) + " holds " + std::to_string(page_size_) +
                                " tokens, got " + std::to_string(tokens.size()));
  }
  if (parent != 0 && !pages_[held(parent, "commit")].prefix) {
    throw std::invalid_argument(at("commit", parent) + ", the parent, is not committed");
  }
  const Key key{pages_[parent].prefix, tokens, salt};
  if (pages_[page].prefix) {
    if (key_of(page) == key) return;
    throw std::invalid_argument(at("commit", page) + " is committed with other content");
  }
  // Equal content gets the prefix id it already has, so that either page can continue the chain.
  const PageId twin = find(key);
  std::vector<Token> own_tokens(tokens.begin(), tokens.end());
  std::string own_salt(salt);
  index_.emplace(hash(key), page);  // the last thing that can throw
  pages_[page].prefix = twin ? pages_[twin].prefix : next_prefix_++;
  pages_[page].parent = key.parent;
  pages_[page].tokens = std::move(own_tokens);
  pages_[page].salt = std::move(own_salt);
}

PageId BlockPool::in_range(PageId page, const char* verb) const {
  if (page < 0 || page >= std::ssize(pages_)) {
    throw std::out_of_range(at(verb, page) + " is outside [0, " + std::to_string(pages_.size()) +
                            ")");
  }
  return page;
}

PageId BlockPool::held(PageId page, const char* verb) const {
  if (in_range(page, verb) == 0) throw std::invalid_argument(at(verb, page) + " is reserved");
  if (pages_[page].refs == 0) throw std::invalid_argument(at(verb, page) + " is not held");
  return page;
}

uint64_t BlockPool::hash(const Key& key) const {
  uint64_t h = mix(key.parent);
  for (Token token : key.tokens) h = mix(h + static_cast<uint64_t>(token));
  return mix(h + std::hash<std::string_view>{}(key.salt)) & hash_mask_;
}

BlockPool::Key BlockPool::key_of(PageId page) const {
  return {pages_[page].parent, pages_[page].tokens, pages_[page].salt};
}

// A page with exactly this content, or 0. A held one is preferred, as it costs no free page.
PageId BlockPool::find(const Key& key) const {
  PageId found = 0;
  const auto [begin, end] = index_.equal_range(hash(key));
  for (auto it = begin; it != end; ++it) {
    if (key_of(it->second) == key && pages_[it->second].refs >= pages_[found].refs) {
      found = it->second;
    }
  }
  return found;
}

// Takes a committed page out of the index.
void BlockPool::forget(PageId page) {
  const auto [begin, end] = index_.equal_range(hash(key_of(page)));
  index_.erase(
      std::find_if(begin, end, [page](const auto& entry) { return entry.second == page; }));
  pages_[page].prefix = 0;
}

void BlockPool::link_before(PageId page, PageId next) {
  const PageId prev = pages_[next].prev;
  pages_[page].prev = prev;
  pages_[page].next = next;
  pages_[prev].next = page;
  pages_[next].prev = page;
  ++num_free_;
}

void BlockPool::unlink(PageId page) {
  pages_[pages_[page].prev].next = pages_[page].next;
  pages_[pages_[page].next].prev = pages_[page].prev;
  pages_[page].prev = pages_[page].next = kUnlinked;
  --num_free_;
}

}  // namespace effllm
