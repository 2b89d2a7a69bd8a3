# libdsconv, static and shared, and the package that find_package(dsconv) finds.
include(CMakePackageConfigHelpers)
include(GNUInstallDirs)

include(cmake/schema.cmake)

# Once for both libraries.
add_library(network OBJECT ${network_sources})
use_options(network)
use_schema(network)
# Where there are others, the scalar kernels are for processors of long ago: small is enough.
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64)$")
  set_source_files_properties(csrc/isa/scalar.cpp PROPERTIES COMPILE_OPTIONS -Os)
endif()
set_source_files_properties(${network_sources} csrc/program/program.cpp PROPERTIES COMPILE_OPTIONS -Os)

add_library(dsconv SHARED $<TARGET_OBJECTS:network> $<TARGET_OBJECTS:kernels>)
set_target_properties(dsconv PROPERTIES VERSION ${DSCONV_VERSION} SOVERSION 1)
add_library(dsconv_static STATIC $<TARGET_OBJECTS:network> $<TARGET_OBJECTS:kernels>)
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
