# Finds nvcc and the CUDA runtime, and compiles .cu files into objects.
# CMake's own CUDA language is not used: it cannot link against NVIDIA's wheels (no libcudart.so, no
# lib64), and it gives no place to keep what ptxas says about each kernel.
#
# Looks in CUDA_HOME, then PATH, then the wheels nvidia-cuda-nvcc, -crt, -cccl, -runtime and
# nvidia-nvvm of Python_EXECUTABLE. Gives
#   Nvcc_EXECUTABLE  Nvcc_VERSION (such as 13.0)  Nvcc_CUDART (libcudart.so.<major>)
#   nvcc_objects(<out> SOURCES .. FLAGS .. ARCHS ..)
execute_process(
  COMMAND "${Python_EXECUTABLE}" -c "import sysconfig; print(sysconfig.get_path('platlib'))"
  OUTPUT_VARIABLE _site_packages OUTPUT_STRIP_TRAILING_WHITESPACE)

unset(Nvcc_EXECUTABLE CACHE)
find_program(Nvcc_EXECUTABLE nvcc HINTS "$ENV{CUDA_HOME}/bin" NO_CMAKE_SYSTEM_PATH)
if(NOT Nvcc_EXECUTABLE)
  file(GLOB _wheel_bins "${_site_packages}/nvidia/cu*/bin")
  find_program(Nvcc_EXECUTABLE nvcc PATHS ${_wheel_bins} NO_DEFAULT_PATH)
endif()

set(Nvcc_VERSION "")
set(Nvcc_CUDART "")
if(Nvcc_EXECUTABLE)
  execute_process(COMMAND "${Nvcc_EXECUTABLE}" --version OUTPUT_VARIABLE _nvcc_text)
  string(REGEX MATCH "release ([0-9]+\\.[0-9]+)" _ "${_nvcc_text}")
  set(Nvcc_VERSION "${CMAKE_MATCH_1}")
  # nvcc on PATH may be a link or a wrapper: its own dry run tells the toolkit's folder.
  execute_process(COMMAND "${Nvcc_EXECUTABLE}" --dryrun -x cu /dev/null ERROR_VARIABLE _nvcc_text)
  string(REGEX MATCH "#\\$ TOP=([^\r\n]+)" _ "${_nvcc_text}")
  set(_top "${CMAKE_MATCH_1}")
  # By path and with its version: the wheels have no libcudart.so link.
  file(GLOB _cudart "${_top}/lib64/libcudart.so.*" "${_top}/lib/libcudart.so.*"
                    "${_top}/targets/*-linux/lib/libcudart.so.*")
  if(_cudart)
    list(GET _cudart 0 Nvcc_CUDART)
  endif()
endif()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(Nvcc
  REQUIRED_VARS Nvcc_EXECUTABLE Nvcc_CUDART
  VERSION_VAR Nvcc_VERSION)
if(NOT Nvcc_FOUND)
  set(Nvcc_NOT_FOUND_MESSAGE
      "no nvcc >= ${Nvcc_FIND_VERSION} with its runtime library in CUDA_HOME, PATH or NVIDIA's wheels")
endif()

# nvcc_objects(<out> SOURCES files FLAGS flags ARCHS archs): one object per file, with a dependency
# file, and a log (<object>.log) of seconds and registers that .ci/check_ptxas.py reads.
function(nvcc_objects out)
  cmake_parse_arguments(PARSE_ARGV 1 arg "" "" "SOURCES;FLAGS;ARCHS")
  set(gencode "")
  foreach(arch IN LISTS arg_ARCHS)
    # Every GPU of 9.0 has what 90a adds, wgmma for one.
    string(REGEX REPLACE "^90$" "90a" machine "${arch}")
    list(APPEND gencode -gencode "arch=compute_${machine},code=sm_${machine}")
  endforeach()
  # Later GPUs compile the PTX of the highest architecture; "90a" code runs on sm_90 alone.
  list(SORT arg_ARCHS COMPARE NATURAL)
  list(POP_BACK arg_ARCHS highest)
  if(highest MATCHES "^[0-9]+$")
    list(APPEND gencode -gencode "arch=compute_${highest},code=compute_${highest}")
  endif()

  set(objects "")
  foreach(source IN LISTS arg_SOURCES)
    file(RELATIVE_PATH name "${CMAKE_CURRENT_SOURCE_DIR}" "${source}")
    set(object "${CMAKE_CURRENT_BINARY_DIR}/${name}.o")
    cmake_path(GET object PARENT_PATH folder)
    file(MAKE_DIRECTORY "${folder}")
    add_custom_command(
      OUTPUT "${object}"
      COMMAND "${Python_EXECUTABLE}" "${CMAKE_SOURCE_DIR}/third_party/cmake/compile_logged.py"
              "${object}.log"
              ${EFFLLM_LAUNCHER} "${Nvcc_EXECUTABLE}" ${gencode} ${arg_FLAGS}
              -MD -MF "${object}.d" -MT "${object}" -c "${source}" -o "${object}"
      DEPENDS "${source}" "${CMAKE_SOURCE_DIR}/third_party/cmake/compile_logged.py"
      DEPFILE "${object}.d"
      COMMENT "Building CUDA object ${name}.o"
      VERBATIM)
    list(APPEND objects "${object}")
  endforeach()
  set_source_files_properties(${objects} PROPERTIES EXTERNAL_OBJECT ON GENERATED ON)
  set(${out} "${objects}" PARENT_SCOPE)
endfunction()
