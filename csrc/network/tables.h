// Checked access to the tables of a file.
#pragma once

#include <cstdint>
#include <string>
#include <type_traits>

#include "error.h"
#include "network_generated.h"

namespace dsconv {

inline void require(bool holds, const char* what) {
  if (!holds) throw FileError(std::string("the file is damaged: ") + what);
}

template <class T>
const T* needed(const T* field) {
  require(field, "a field is missing");
  return field;
}

// The verifier of FlatBuffers does not check the alignment of vector elements.
template <class T>
const flatbuffers::Vector<T>& items(const flatbuffers::Vector<T>* vector) {
  needed(vector);
  require(reinterpret_cast<std::uintptr_t>(vector->Data()) % alignof(std::remove_pointer_t<T>) == 0, "a table is not aligned");
  return *vector;
}

template <class Enum>
Enum one_of(const char* what, int value, int count) {
  require(value >= 0 && value < count, what);
  return static_cast<Enum>(value);
}

}  // namespace dsconv
