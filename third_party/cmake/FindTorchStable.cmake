# Finds the parts of torch that the stable ABI needs: the include folder, libtorch and libtorch_cpu.
# `find_package(Torch)` is not used: with a CUDA torch and no CUDA toolkit it stops the build.
#
# Needs Python_EXECUTABLE. Gives
#   TorchStable_VERSION         such as 2.13.0
#   TorchStable_INCLUDE_DIR
#   TorchStable_TARGET_VERSION  the oldest torch that may load what is built (TORCH_TARGET_VERSION)
#   TorchStable::TorchStable    include folder, definition and libraries
set(TorchStable_TARGET_VERSION 0x020b000000000000)  # 2.11

# find_spec does not import torch (seconds), it only says where the package is. Asked anew on each
# configure, since the environment may have got another torch.
execute_process(
  COMMAND "${Python_EXECUTABLE}" -c
          "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])"
  OUTPUT_VARIABLE TorchStable_ROOT OUTPUT_STRIP_TRAILING_WHITESPACE
  ERROR_QUIET)

set(TorchStable_VERSION "")
if(TorchStable_ROOT)
  set(TorchStable_INCLUDE_DIR "${TorchStable_ROOT}/include")
  file(STRINGS "${TorchStable_ROOT}/version.py" TorchStable_VERSION REGEX "^__version__ = ")
  string(REGEX MATCH "[0-9]+\\.[0-9]+\\.[0-9]+" TorchStable_VERSION "${TorchStable_VERSION}")
endif()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(TorchStable
  REQUIRED_VARS TorchStable_ROOT TorchStable_INCLUDE_DIR
  VERSION_VAR TorchStable_VERSION
  REASON_FAILURE_MESSAGE "Install torch into ${Python_EXECUTABLE} and build without build isolation.")

if(TorchStable_FOUND AND NOT TARGET TorchStable::TorchStable)
  add_library(TorchStable::TorchStable INTERFACE IMPORTED)
  target_include_directories(TorchStable::TorchStable SYSTEM INTERFACE "${TorchStable_INCLUDE_DIR}")
  target_compile_definitions(TorchStable::TorchStable INTERFACE
    TORCH_TARGET_VERSION=${TorchStable_TARGET_VERSION})
  target_link_libraries(TorchStable::TorchStable INTERFACE
    "${TorchStable_ROOT}/lib/libtorch.so" "${TorchStable_ROOT}/lib/libtorch_cpu.so")
endif()
