// What is found out once per device.
#pragma once

#include <cstddef>
#include <mutex>
#include <optional>
#include <vector>

namespace effllm {

template <class T>
class PerDevice {
 public:
  // `find` is called for a device's first caller, while the device is current.
  template <class Find>
  T get(int device, const Find& find) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto index = static_cast<size_t>(device);
    if (known_.size() <= index) known_.resize(index + 1);
    if (!known_[index]) known_[index] = find();
    return *known_[index];
  }

 private:
  std::mutex mutex_;
  std::vector<std::optional<T>> known_;
};

}  // namespace effllm
