/* Runs networks written by `dsconv compile` in low-bit integers, without Python and PyTorch.

   Every function that can fail returns a status; dsconv_error() then returns a message. An open network is immutable: any
   number of threads may run it concurrently. */
#ifndef DSCONV_H
#define DSCONV_H

#include <stddef.h>
#include <stdint.h>

#define DSCONV_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

/* Changes with every incompatible change of the interface: a program must be built again for the new library. */
#define DSCONV_ABI_VERSION 1
#define DSCONV_MAX_RANK 8

typedef enum dsconv_status {
  DSCONV_OK = 0,
  DSCONV_INVALID_ARGUMENT = 1, /* an invalid shape, type, number or null pointer */
  DSCONV_INVALID_FILE = 2,     /* damaged, or not a compiled network */
  DSCONV_UNSUPPORTED = 3,      /* written for a newer library */
  DSCONV_IO_ERROR = 4,         /* the file cannot be opened or read */
  DSCONV_NO_MEMORY = 5,
  DSCONV_INTERNAL_ERROR = 6
} dsconv_status;

typedef enum dsconv_type { DSCONV_FLOAT32 = 1 } dsconv_type;

/* A tensor, or its description: free sizes are -1, and the number of samples is always free. */
typedef struct dsconv_tensor {
  void* data;             /* values, owned by the caller, aligned to their type; ignored if only shapes are requested */
  size_t bytes;           /* size of the memory at `data` */
  const int64_t* strides; /* of each dimension, in values, at least 0; NULL for contiguous values */
  dsconv_type type;
  size_t rank;
  int64_t shape[DSCONV_MAX_RANK];
} dsconv_tensor;

typedef struct dsconv_network dsconv_network;

/* Returns DSCONV_ABI_VERSION of the library. */
DSCONV_API uint32_t dsconv_abi_version(void);
/* Returns the version of the library, "1.2.3". */
DSCONV_API const char* dsconv_version(void);
/* Returns the instruction set for networks that are opened now: the best of this processor, limited by the environment
   variable DSCONV_MAX_ISA. An open network keeps its instruction set. */
DSCONV_API const char* dsconv_isa(void);
/* Returns the error message of the last call of this thread that did not return DSCONV_OK. */
DSCONV_API const char* dsconv_error(void);

/* Sets the number of threads for the networks of this process, 1 to 1024; the default is the number of processors that the
   process may use. If runs are concurrent, one uses the threads, and the others use their caller's thread. A child of fork()
   has its own threads. */
DSCONV_API dsconv_status dsconv_set_threads(int threads);
DSCONV_API int dsconv_threads(void);

/* Opens and maps a file: it must not be modified until the network is closed, but may be deleted or replaced. On failure,
 *network is NULL. Also returns DSCONV_INVALID_ARGUMENT if DSCONV_MAX_ISA is not an instruction set. */
DSCONV_API dsconv_status dsconv_open(const char* path, dsconv_network** network);
/* Opens `size` bytes in memory, aligned to 64 bytes, which must not change until the network is closed. */
DSCONV_API dsconv_status dsconv_open_memory(const void* data, size_t size, dsconv_network** network);
/* Closes a network that no thread runs; NULL has no effect. */
DSCONV_API void dsconv_close(dsconv_network* network);

DSCONV_API size_t dsconv_input_count(const dsconv_network* network);
DSCONV_API size_t dsconv_output_count(const dsconv_network* network);
/* Returns the name of an input or output; NULL for an invalid index. */
DSCONV_API const char* dsconv_input_name(const dsconv_network* network, size_t index);
DSCONV_API const char* dsconv_output_name(const dsconv_network* network, size_t index);
/* Sizes that a network accepts: it was compiled for dsconv_size_count() combinations, each with the shapes of all inputs and
   outputs. The functions set type, rank and shape of `tensor`. */
DSCONV_API size_t dsconv_size_count(const dsconv_network* network);
DSCONV_API dsconv_status dsconv_input_shape(const dsconv_network* network, size_t size, size_t index, dsconv_tensor* tensor);
DSCONV_API dsconv_status dsconv_output_shape(const dsconv_network* network, size_t size, size_t index, dsconv_tensor* tensor);
/* Returns the step of further sizes: heights and widths, of all inputs alike, may differ from those of size 0 by multiples of
   this number. 1 means any size that is large enough for the network; 0 means no other sizes. dsconv_run() without `data` of
   outputs returns their shapes. The first run of a size prepares it, and the last 16 sizes are cached. */
DSCONV_API int64_t dsconv_size_step(const dsconv_network* network);

/* Returns the preprocessing of images as JSON: the settings of dsconv.Preprocess. NULL if the file does not state it. */
DSCONV_API const char* dsconv_preprocess(const dsconv_network* network);
/* Names of the classes; 0 and NULL if the file has none. */
DSCONV_API size_t dsconv_class_count(const dsconv_network* network);
DSCONV_API const char* dsconv_class_name(const dsconv_network* network, size_t index);
/* Returns the bytes of memory that the network holds in addition to the mapped file. */
DSCONV_API size_t dsconv_weight_bytes(const dsconv_network* network);
/* Returns the bytes of memory that a run on inputs of these types, ranks and shapes needs: SIZE_MAX if that exceeds any memory.
   The network caches the memory of up to 4 runs until it is closed. */
DSCONV_API dsconv_status dsconv_run_bytes(const dsconv_network* network, const dsconv_tensor* inputs, size_t input_count,
                                          size_t* bytes);

/* Runs the network on all inputs, float32 with the same number of samples. The call sets type, rank and shape of every output,
   and writes its values to `data`, contiguously or according to `strides`. Outputs without `data` are skipped; if all are, nothing
   is computed, and the shapes determine the memory that the outputs need. Outputs must not overlap inputs or one another. */
DSCONV_API dsconv_status dsconv_run(const dsconv_network* network, const dsconv_tensor* inputs, size_t input_count,
                                    dsconv_tensor* outputs, size_t output_count);

#ifdef __cplusplus
}
#endif

#endif /* DSCONV_H */
