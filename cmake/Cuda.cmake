# DSLA_CUDA: AUTO uses a CUDA toolkit if one is found, ON demands one, OFF does not look. Sets DSLA_HAVE_CUDA, and
# DSLA_NVCC to the compiler. It only looks for nvcc and asks its version: no try-compile, so it costs nothing without one.
set(DSLA_CUDA AUTO CACHE STRING "Build the CUDA part: AUTO, ON or OFF")
set_property(CACHE DSLA_CUDA PROPERTY STRINGS AUTO ON OFF)
set(DSLA_CUDA_OLDEST 12.8)  # the first that knows every GPU generation up to Blackwell

set(DSLA_HAVE_CUDA FALSE)
if(NOT DSLA_CUDA)
  set(dsla_cuda_status "off (DSLA_CUDA=${DSLA_CUDA})")
else()
  find_program(DSLA_NVCC nvcc HINTS $ENV{CUDA_HOME} $ENV{CUDA_PATH} /usr/local/cuda PATH_SUFFIXES bin)
  if(NOT DSLA_NVCC)
    set(dsla_cuda_status "no toolkit found; building for the CPU alone")
  else()
    execute_process(COMMAND ${DSLA_NVCC} --version OUTPUT_VARIABLE dsla_nvcc_version ERROR_QUIET)
    string(REGEX MATCH "release ([0-9]+\\.[0-9]+)" dsla_nvcc_version "${dsla_nvcc_version}")
    set(dsla_nvcc_version "${CMAKE_MATCH_1}")
    if(NOT dsla_nvcc_version)
      set(dsla_cuda_status "${DSLA_NVCC} does not run")
    elseif(dsla_nvcc_version VERSION_LESS DSLA_CUDA_OLDEST)
      set(dsla_cuda_status "toolkit ${dsla_nvcc_version} is older than ${DSLA_CUDA_OLDEST} (${DSLA_NVCC})")
    else()
      # FlashInfer's headers, and the CCCL that they need, from the wheel in the project's own .venv (or DSLA_FLASHINFER_DIR).
      if("${DSLA_FLASHINFER_DIR}" MATCHES "^$|/\\.venv/" AND NOT EXISTS "${DSLA_FLASHINFER_DIR}/include/flashinfer")
        unset(DSLA_FLASHINFER_DIR CACHE)  # a .venv made since, or made anew with another Python version
      endif()
      file(GLOB dsla_flashinfer_dir ${PROJECT_SOURCE_DIR}/.venv/lib/python3*/site-packages/flashinfer/data)
      set(DSLA_FLASHINFER_DIR "${dsla_flashinfer_dir}" CACHE PATH "The flashinfer package's data folder (with include/ and cccl/)")
      if(EXISTS "${DSLA_FLASHINFER_DIR}/include/flashinfer/attention/prefill.cuh")
        set(dsla_cuda_status "toolkit ${dsla_nvcc_version} (${DSLA_NVCC})")
        set(DSLA_HAVE_CUDA TRUE)
      else()
        string(CONCAT dsla_cuda_status "FlashInfer's headers are missing (DSLA_FLASHINFER_DIR is '${DSLA_FLASHINFER_DIR}'): run "
               "./quickstart, or set DSLA_FLASHINFER_DIR to flashinfer/data of an installed flashinfer-python")
      endif()
    endif()
  endif()
endif()
message(STATUS "CUDA: ${dsla_cuda_status}")
if(DSLA_CUDA AND NOT DSLA_CUDA STREQUAL "AUTO" AND NOT DSLA_HAVE_CUDA)
  message(FATAL_ERROR "DSLA_CUDA=${DSLA_CUDA}, but ${dsla_cuda_status}")
endif()

# Real code for each of these compute capabilities; 90a also knows Hopper's own instructions. 8.0 code runs on 8.6 and 8.9.
set(DSLA_CUDA_ARCHS 80 90a CACHE STRING "Compute capabilities to build GPU code for")
if("90" IN_LIST DSLA_CUDA_ARCHS)
  message(FATAL_ERROR "DSLA_CUDA_ARCHS has 90: say 90a, as compute capability 9.0 gets kernels of Hopper's own instructions")
endif()

# For compute-sanitizer --tool racecheck, which counts an mbarrier's arrival by one lane for that lane alone.
option(DSLA_ALL_LANES_ARRIVE "All lanes arrive at the kernels' barriers in shared memory" OFF)

# dsla_cuda_library(NAME <name> SRCS <files.cu>): the shared library dsla_<name>, with a runtime of its own linked in, so
# that nothing of CUDA is needed to link against it or to start. No CUDA language is enabled: nvcc runs by plain commands, so
# that configuring tries no compiler. A kernel that spills registers or uses local memory fails the build, as does every other
# warning of ptxas (serialised wgmma is one), but in a source with the property DSLA_FOREIGN_KERNELS: what it instantiates is not
# ours to change. The property DSLA_CUDA_ARCHS replaces the list above for a source. Sources may lie in other folders of src/:
# their objects are named after their path there.
function(dsla_cuda_library)
  cmake_parse_arguments(ARG "" "NAME" "SRCS" ${ARGN})
  cmake_path(GET DSLA_NVCC PARENT_PATH toolkit)
  cmake_path(GET toolkit PARENT_PATH toolkit)
  set(flags -std=c++20 -O3 -I${PROJECT_SOURCE_DIR}/src --expt-relaxed-constexpr -Xcompiler=-fPIC,-Wall,-Wextra,-Werror,-fvisibility=hidden
      --Werror=all-warnings)
  set(checks -Xptxas=--warn-on-spills,--warn-on-local-memory-usage,--warning-as-error)
  set(foreign -isystem ${DSLA_FLASHINFER_DIR}/include -isystem ${DSLA_FLASHINFER_DIR}/cccl/libcudacxx/include
      -isystem ${DSLA_FLASHINFER_DIR}/cutlass/include -isystem ${DSLA_FLASHINFER_DIR}/cutlass/tools/util/include)
  if(NOT CMAKE_BUILD_TYPE STREQUAL "Debug")
    list(APPEND flags -DNDEBUG)
  endif()
  if(DSLA_ALL_LANES_ARRIVE)
    list(APPEND flags -DDSLA_ALL_LANES_ARRIVE)
  endif()
  set(objects)
  foreach(source ${ARG_SRCS})
    cmake_path(ABSOLUTE_PATH source BASE_DIRECTORY ${CMAKE_CURRENT_SOURCE_DIR} NORMALIZE OUTPUT_VARIABLE path)
    cmake_path(RELATIVE_PATH path BASE_DIRECTORY ${PROJECT_SOURCE_DIR}/src OUTPUT_VARIABLE name)
    string(REPLACE / _ object ${name})
    set(object ${CMAKE_CURRENT_BINARY_DIR}/${object}.o)
    get_source_file_property(is_foreign ${source} DSLA_FOREIGN_KERNELS)
    set(options ${checks})
    if(is_foreign)
      set(options ${foreign})
    endif()
    get_source_file_property(archs ${source} DSLA_CUDA_ARCHS)
    if(NOT archs)
      set(archs ${DSLA_CUDA_ARCHS})
    endif()
    list(TRANSFORM archs REPLACE "(.+)" "-gencode=arch=compute_\\1,code=sm_\\1")
    add_custom_command(OUTPUT ${object} DEPFILE ${object}.d
      COMMAND ${CMAKE_CXX_COMPILER_LAUNCHER} ${DSLA_NVCC} ${flags} ${archs} ${options} -MD -MF ${object}.d -MT ${object} -c ${path} -o ${object}
      DEPENDS ${path} COMMENT "nvcc ${name}" VERBATIM)
    list(APPEND objects ${object})
  endforeach()
  add_library(dsla_${ARG_NAME} SHARED ${objects})
  set_target_properties(dsla_${ARG_NAME} PROPERTIES LINKER_LANGUAGE CXX LIBRARY_OUTPUT_DIRECTORY ${PROJECT_BINARY_DIR})
  target_include_directories(dsla_${ARG_NAME} PUBLIC ${PROJECT_SOURCE_DIR}/src)
  # Its symbols stay inside: a program may have another runtime.
  target_link_libraries(dsla_${ARG_NAME} PRIVATE ${toolkit}/lib64/libcudart_static.a ${CMAKE_DL_LIBS} pthread rt)
  target_link_options(dsla_${ARG_NAME} PRIVATE -Wl,--exclude-libs,ALL)
endfunction()

# What a test or benchmark that calls the CUDA runtime itself links.
if(DSLA_HAVE_CUDA)
  cmake_path(GET DSLA_NVCC PARENT_PATH dsla_toolkit)
  cmake_path(GET dsla_toolkit PARENT_PATH dsla_toolkit)
  add_library(dsla_cuda_runtime INTERFACE)
  target_include_directories(dsla_cuda_runtime SYSTEM INTERFACE ${dsla_toolkit}/include)
  target_link_libraries(dsla_cuda_runtime INTERFACE ${dsla_toolkit}/lib64/libcudart_static.a ${CMAKE_DL_LIBS} pthread rt)
endif()
