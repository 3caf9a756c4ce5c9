# One way to declare a library, a test, a bench or a fuzz target, so that flags and registration are the same everywhere.

# What a preset builds beyond single targets: what ./quickstart runs, the tests that ThreadSanitizer runs, and the fuzzers.
add_custom_target(quickstart)
add_custom_target(tsan_tests)
add_custom_target(fuzz_targets)

function(dsla_options target)
  target_compile_options(${target} PRIVATE -Wall -Wextra -Werror)
  target_include_directories(${target} PUBLIC ${PROJECT_SOURCE_DIR}/src)
  if(DSLA_SANITIZE)
    string(REPLACE ";" "," sanitizers "${DSLA_SANITIZE}")
    target_compile_options(${target} PRIVATE -fsanitize=${sanitizers} -fno-sanitize-recover=all -fno-omit-frame-pointer)
    target_link_options(${target} PUBLIC -fsanitize=${sanitizers})
    if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
      # Sanitizer instrumentation hides initialisation from g++'s flow analysis; Release keeps the warning.
      target_compile_options(${target} PRIVATE -Wno-maybe-uninitialized)
    endif()
  endif()
  if(DSLA_FUZZ)
    target_compile_options(${target} PRIVATE -fsanitize=fuzzer-no-link)
  endif()
endfunction()

# Notes that a test, bench or fuzz target is declared, even where this preset does not build it. The list is written to
# registered.txt of the build folder, one "kind<tab>name<tab>source" a line, for tools/check_tests_registered.py.
function(dsla_register kind name)
  foreach(source ${ARGN})
    cmake_path(ABSOLUTE_PATH source BASE_DIRECTORY ${CMAKE_CURRENT_SOURCE_DIR} NORMALIZE)
    set_property(GLOBAL APPEND_STRING PROPERTY DSLA_REGISTERED "${kind}\t${name}\t${source}\n")
  endforeach()
endfunction()
function(dsla_write_registered)
  get_property(registered GLOBAL PROPERTY DSLA_REGISTERED)
  file(WRITE ${PROJECT_BINARY_DIR}/registered.txt "${registered}")
endfunction()
cmake_language(DEFER DIRECTORY ${PROJECT_SOURCE_DIR} CALL dsla_write_registered)

# dsla_library(NAME <name> SRCS <files> [DEPS <targets>]): the static library dsla_<name>.
function(dsla_library)
  cmake_parse_arguments(ARG "" "NAME" "SRCS;DEPS" ${ARGN})
  add_library(dsla_${ARG_NAME} STATIC ${ARG_SRCS})
  dsla_options(dsla_${ARG_NAME})
  target_link_libraries(dsla_${ARG_NAME} PUBLIC ${ARG_DEPS})
endfunction()

# dsla_loaded_library(NAME <name> SRCS <files> [DEPS <targets>]): the shared library dsla_<name>, which programs load when they need it
# (base/shared_library.h): it is left beside the program, and keeps the symbols of the static libraries in it to itself.
function(dsla_loaded_library)
  cmake_parse_arguments(ARG "" "NAME" "SRCS;DEPS" ${ARGN})
  add_library(dsla_${ARG_NAME} SHARED ${ARG_SRCS})
  dsla_options(dsla_${ARG_NAME})
  set_target_properties(dsla_${ARG_NAME} PROPERTIES LIBRARY_OUTPUT_DIRECTORY ${PROJECT_BINARY_DIR})
  target_link_libraries(dsla_${ARG_NAME} PRIVATE ${ARG_DEPS})
  target_link_options(dsla_${ARG_NAME} PRIVATE -Wl,--exclude-libs,ALL)
endfunction()

# dsla_test(NAME <name> SRCS <files> [DEPS <targets>] [LABELS <labels>] [ARGS <arguments>] [ENV <name=value>...] [TIMEOUT <s>]):
# a GoogleTest program run by CTest as <name>. It finds data through the compile definition DSLA_SOURCE_DIR; what it writes
# to testing::TempDir() is in a folder of its own below the build's, so that another build's tests may run beside it. With the
# label tsan it also runs under ThreadSanitizer, so it must not need libtorch or OpenMP threads.
function(dsla_test)
  cmake_parse_arguments(ARG "" "NAME;TIMEOUT" "SRCS;DEPS;LABELS;ARGS;ENV" ${ARGN})
  dsla_register(test ${ARG_NAME} ${ARG_SRCS})
  if(NOT DSLA_TESTS)
    return()
  endif()
  add_executable(${ARG_NAME} ${ARG_SRCS})
  dsla_options(${ARG_NAME})
  # Test code runs once after it is compiled: optimising it (and its instrumentation) costs more than it saves.
  target_compile_options(${ARG_NAME} PRIVATE $<IF:$<BOOL:${DSLA_SANITIZE}>,-O0,-O1>)
  target_compile_definitions(${ARG_NAME} PRIVATE DSLA_SOURCE_DIR="${PROJECT_SOURCE_DIR}" DSLA_BINARY_DIR="${PROJECT_BINARY_DIR}")
  target_link_libraries(${ARG_NAME} PRIVATE ${ARG_DEPS} GTest::gmock GTest::gtest_main)
  add_test(NAME ${ARG_NAME} COMMAND ${ARG_NAME} ${ARG_ARGS})
  if(NOT ARG_TIMEOUT)
    set(ARG_TIMEOUT 600)
  endif()
  if(DSLA_SANITIZE)
    math(EXPR ARG_TIMEOUT "3 * ${ARG_TIMEOUT}")
    list(APPEND ARG_ENV UBSAN_OPTIONS=print_stacktrace=1 TSAN_OPTIONS=halt_on_error=1:second_deadlock_stack=1)
  endif()
  set(files ${PROJECT_BINARY_DIR}/test_files/${ARG_NAME})
  file(MAKE_DIRECTORY ${files})
  list(APPEND ARG_ENV TEST_TMPDIR=${files}/)
  set_tests_properties(${ARG_NAME} PROPERTIES TIMEOUT ${ARG_TIMEOUT} LABELS "${ARG_LABELS}" ENVIRONMENT "${ARG_ENV}")
  if("tsan" IN_LIST ARG_LABELS)
    add_dependencies(tsan_tests ${ARG_NAME})
  endif()
endfunction()

# dsla_bench(NAME <name> SRCS <files> [DEPS <targets>]): a Google Benchmark program; built, not run by CTest.
function(dsla_bench)
  cmake_parse_arguments(ARG "" "NAME" "SRCS;DEPS" ${ARGN})
  dsla_register(bench ${ARG_NAME} ${ARG_SRCS})
  if(NOT DSLA_BENCH)
    return()
  endif()
  add_executable(${ARG_NAME} ${ARG_SRCS})
  dsla_options(${ARG_NAME})
  target_link_libraries(${ARG_NAME} PRIVATE ${ARG_DEPS} benchmark::benchmark)
endfunction()

# dsla_fuzz(NAME <name> SRCS <files> [DEPS <targets>] [SEEDS <folder>]): a libFuzzer target; CTest runs it for a short time.
set(DSLA_FUZZ_SECONDS 20 CACHE STRING "How long CTest runs each fuzz target")
function(dsla_fuzz)
  cmake_parse_arguments(ARG "" "NAME;SEEDS" "SRCS;DEPS" ${ARGN})
  dsla_register(fuzz ${ARG_NAME} ${ARG_SRCS})
  if(NOT DSLA_FUZZ)
    return()
  endif()
  add_executable(${ARG_NAME} ${ARG_SRCS})
  dsla_options(${ARG_NAME})
  target_link_libraries(${ARG_NAME} PRIVATE ${ARG_DEPS})
  target_link_options(${ARG_NAME} PRIVATE -fsanitize=fuzzer)
  set(corpus ${CMAKE_CURRENT_BINARY_DIR}/${ARG_NAME}_corpus)
  file(MAKE_DIRECTORY ${corpus})
  # New inputs go to the first folder; a crashing one is left beside the program.
  add_test(NAME ${ARG_NAME} COMMAND ${ARG_NAME} -max_total_time=${DSLA_FUZZ_SECONDS} -rss_limit_mb=2048 -timeout=25
           -print_final_stats=1 -artifact_prefix=${CMAKE_CURRENT_BINARY_DIR}/${ARG_NAME}_ ${corpus} ${ARG_SEEDS})
  math(EXPR limit "${DSLA_FUZZ_SECONDS} + 300")
  set_tests_properties(${ARG_NAME} PROPERTIES LABELS fuzz TIMEOUT ${limit})
  add_dependencies(fuzz_targets ${ARG_NAME})
endfunction()
