# In step with build_packages in tools/setup_lib.sh.
find_package(fmt REQUIRED)
find_package(Threads REQUIRED)
find_package(nlohmann_json REQUIRED)
find_package(PkgConfig REQUIRED)
pkg_check_modules(PCRE2 REQUIRED IMPORTED_TARGET libpcre2-8)
find_package(OpenSSL REQUIRED COMPONENTS Crypto SSL)
find_package(Boost 1.81 CONFIG REQUIRED)  # headers: Asio and Beast
find_package(spdlog REQUIRED)
find_package(simdjson REQUIRED)
pkg_check_modules(TOMLPLUSPLUS REQUIRED IMPORTED_TARGET tomlplusplus)
find_package(ICU REQUIRED COMPONENTS uc)
find_package(CLI11 REQUIRED)
pkg_check_modules(HWY REQUIRED IMPORTED_TARGET libhwy)
if(DSLA_TESTS)
  find_package(GTest REQUIRED)
endif()
if(DSLA_BENCH)
  find_package(benchmark REQUIRED)
endif()

# libtorch from the torch wheel in the project's own .venv (or DSLA_TORCH_DIR). Only libtorch_cpu and libc10 are linked;
# their own dependencies (the CUDA runtime and CUPTI wheels) lie beside the wheel and are found by its RPATH.
if(DSLA_TORCH)
  if("${DSLA_TORCH_DIR}" MATCHES "^$|/\\.venv/" AND NOT EXISTS "${DSLA_TORCH_DIR}/lib/libtorch_cpu.so")
    unset(DSLA_TORCH_DIR CACHE)  # a .venv made since, or made anew with another Python version
  endif()
  set(dsla_torch_dir)
  file(GLOB dsla_candidates ${PROJECT_SOURCE_DIR}/.venv/lib/python3*/site-packages/torch)
  foreach(candidate ${dsla_candidates})
    if(EXISTS ${candidate}/lib/libtorch_cpu.so)
      set(dsla_torch_dir ${candidate})
    endif()
  endforeach()
  set(DSLA_TORCH_DIR "${dsla_torch_dir}" CACHE PATH "The torch package folder (with include/ and lib/)")
  if(NOT EXISTS "${DSLA_TORCH_DIR}/lib/libtorch_cpu.so")
    message(FATAL_ERROR "libtorch not found (DSLA_TORCH_DIR is '${DSLA_TORCH_DIR}'): run ./quickstart, or set DSLA_TORCH_DIR to an installed torch package")
  endif()
  add_library(torch_cpu INTERFACE)
  # After the system's folders: the wheel carries a newer fmt, which would hide the one that is linked.
  target_compile_options(torch_cpu INTERFACE "SHELL:-idirafter ${DSLA_TORCH_DIR}/include"
                         "SHELL:-idirafter ${DSLA_TORCH_DIR}/include/torch/csrc/api/include")
  get_filename_component(dsla_site_packages ${DSLA_TORCH_DIR} DIRECTORY)
  # By flags, not by path: the libraries keep their sonames, and the RUNPATH finds them.
  target_link_libraries(torch_cpu INTERFACE -l:libtorch_cpu.so -l:libc10.so)
  target_link_options(torch_cpu INTERFACE -L${DSLA_TORCH_DIR}/lib
    -Wl,-rpath,${DSLA_TORCH_DIR}/lib
    -Wl,-rpath-link,${dsla_site_packages}/nvidia/cu13/lib -Wl,--allow-shlib-undefined)
endif()

# XGrammar and TVM FFI, from their wheels in the project's own .venv (or DSLA_XGRAMMAR_DIR): a header of the latter is
# compiled with, and the processes of grammars load their libraries from there.
if("${DSLA_XGRAMMAR_DIR}" MATCHES "^$|/\\.venv/" AND NOT EXISTS "${DSLA_XGRAMMAR_DIR}/tvm_ffi/include/tvm/ffi/c_api.h")
  unset(DSLA_XGRAMMAR_DIR CACHE)
endif()
set(dsla_xgrammar_dir)
file(GLOB dsla_candidates ${PROJECT_SOURCE_DIR}/.venv/lib/python3*/site-packages)
foreach(candidate ${dsla_candidates})
  if(EXISTS ${candidate}/tvm_ffi/include/tvm/ffi/c_api.h)
    set(dsla_xgrammar_dir ${candidate})
  endif()
endforeach()
set(DSLA_XGRAMMAR_DIR "${dsla_xgrammar_dir}" CACHE PATH "The folder with the packages xgrammar and tvm_ffi")
if(NOT EXISTS "${DSLA_XGRAMMAR_DIR}/tvm_ffi/include/tvm/ffi/c_api.h")
  message(FATAL_ERROR "XGrammar not found (DSLA_XGRAMMAR_DIR is '${DSLA_XGRAMMAR_DIR}'): run ./quickstart, or set DSLA_XGRAMMAR_DIR to the folder of its installed packages")
endif()
add_library(tvm_ffi INTERFACE)
target_include_directories(tvm_ffi SYSTEM INTERFACE ${DSLA_XGRAMMAR_DIR}/tvm_ffi/include)

# Everything that a header of the project may include, for header_alone.
set(DSLA_EXTERNAL_LIBRARIES fmt::fmt Threads::Threads nlohmann_json::nlohmann_json PkgConfig::PCRE2
    OpenSSL::Crypto OpenSSL::SSL ICU::uc CLI11::CLI11 PkgConfig::HWY Boost::headers spdlog::spdlog simdjson::simdjson
    PkgConfig::TOMLPLUSPLUS tvm_ffi)
if(DSLA_TESTS)
  list(APPEND DSLA_EXTERNAL_LIBRARIES GTest::gmock)
endif()
if(DSLA_TORCH)
  list(APPEND DSLA_EXTERNAL_LIBRARIES torch_cpu)
endif()
