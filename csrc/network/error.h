#pragma once

#include <stdexcept>
#include <string>

namespace dsconv {

// The file is invalid; `newer`: it was written for a newer library.
class FileError : public std::runtime_error {
 public:
  explicit FileError(const std::string& what, bool newer = false) : std::runtime_error(what), newer(newer) {}
  const bool newer;
};

// The file cannot be opened or read.
class SystemError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

}  // namespace dsconv
