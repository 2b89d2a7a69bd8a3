/* Runs networks that `dsconv compile` wrote, in low-bit integers, without Python and without PyTorch.

   Every function that can fail returns a status; dsconv_error() then has a sentence. A network is fixed once it is open:
   any number of threads may run it at the same time. */
#ifndef DSCONV_H
#define DSCONV_H

#include <stddef.h>
#include <stdint.h>

#define DSCONV_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

/* Changes whenever a program that was built against an older header could not go on with a newer library. */
#define DSCONV_ABI_VERSION 1
#define DSCONV_MAX_RANK 8

typedef enum dsconv_status {
  DSCONV_OK = 0,
  DSCONV_INVALID_ARGUMENT = 1, /* a wrong shape, type, number or null pointer */
  DSCONV_INVALID_FILE = 2,     /* damaged, or no compiled network */
  DSCONV_UNSUPPORTED = 3,      /* written for a newer library */
  DSCONV_IO_ERROR = 4,         /* the file cannot be opened or read */
  DSCONV_NO_MEMORY = 5,
  DSCONV_INTERNAL_ERROR = 6
} dsconv_status;

typedef enum dsconv_type { DSCONV_FLOAT32 = 1 } dsconv_type;

/* A tensor, or what is known of one: sizes that are free are -1, as the number of samples always is. */
typedef struct dsconv_tensor {
  void* data;             /* values of the caller's, aligned as their type is; ignored where only shapes are asked for */
  size_t bytes;           /* of memory at `data` */
  const int64_t* strides; /* of each dimension, in values, none below 0; NULL where values lie one after another */
  dsconv_type type;
  size_t rank;
  int64_t shape[DSCONV_MAX_RANK];
} dsconv_tensor;

typedef struct dsconv_network dsconv_network;

/* DSCONV_ABI_VERSION of the library. */
DSCONV_API uint32_t dsconv_abi_version(void);
/* Version of the library, "1.2.3". */
DSCONV_API const char* dsconv_version(void);
/* Instruction set of the kernels of networks that are opened now: the best of this processor, at most what the environment's
   DSCONV_MAX_ISA names. An open network keeps its own. */
DSCONV_API const char* dsconv_isa(void);
/* What went wrong in the last call of this thread that did not return DSCONV_OK. */
DSCONV_API const char* dsconv_error(void);

/* Sets the number of threads that networks of this process run on, 1 to 1024; at first it is that of the processors that the
   process may use. Runs that meet share them: one has the threads, the others go on alone. A child of fork() has its own. */
DSCONV_API dsconv_status dsconv_set_threads(int threads);
DSCONV_API int dsconv_threads(void);

/* Opens a file, and maps it: it must not be changed until the network is closed, though it may be deleted or replaced. Where
   that fails, *network is NULL. DSCONV_INVALID_ARGUMENT also where DSCONV_MAX_ISA names no instruction set. */
DSCONV_API dsconv_status dsconv_open(const char* path, dsconv_network** network);
/* Opens `size` bytes, aligned to 64, that stay as they are until the network is closed. */
DSCONV_API dsconv_status dsconv_open_memory(const void* data, size_t size, dsconv_network** network);
/* Closes a network, which nobody runs any more; NULL does nothing. */
DSCONV_API void dsconv_close(dsconv_network* network);

DSCONV_API size_t dsconv_input_count(const dsconv_network* network);
DSCONV_API size_t dsconv_output_count(const dsconv_network* network);
/* The name of an input or output; NULL where there is none of that index. */
DSCONV_API const char* dsconv_input_name(const dsconv_network* network, size_t index);
DSCONV_API const char* dsconv_output_name(const dsconv_network* network, size_t index);
/* Sizes that a network takes: it was compiled for dsconv_size_count() combinations of them, and each has shapes of all inputs
   and outputs, of which `tensor` gets type, rank and shape. */
DSCONV_API size_t dsconv_size_count(const dsconv_network* network);
DSCONV_API dsconv_status dsconv_input_shape(const dsconv_network* network, size_t size, size_t index, dsconv_tensor* tensor);
DSCONV_API dsconv_status dsconv_output_shape(const dsconv_network* network, size_t size, size_t index, dsconv_tensor* tensor);
/* Further sizes that it takes: heights and widths, of all inputs alike, that differ from those of size 0 by multiples of this
   number. 1 is any size that is large enough for the network; 0: it takes no others. dsconv_run() without `data` of outputs
   tells their shapes. The first run of a size prepares it, and the last 16 are remembered. */
DSCONV_API int64_t dsconv_size_step(const dsconv_network* network);

/* How images are prepared, as JSON: the settings of dsconv.Preprocess. NULL where the file does not say. */
DSCONV_API const char* dsconv_preprocess(const dsconv_network* network);
/* Names of the classes, where the file has them: 0 and NULL otherwise. */
DSCONV_API size_t dsconv_class_count(const dsconv_network* network);
DSCONV_API const char* dsconv_class_name(const dsconv_network* network, size_t index);
/* Bytes of memory that the network holds besides the mapped file. */
DSCONV_API size_t dsconv_weight_bytes(const dsconv_network* network);
/* Bytes of memory that a run on inputs of these types, ranks and shapes takes: SIZE_MAX where that is more than any memory. The
   network keeps the memory of up to 4 runs for the next ones, until it is closed. */
DSCONV_API dsconv_status dsconv_run_bytes(const dsconv_network* network, const dsconv_tensor* inputs, size_t input_count,
                                          size_t* bytes);

/* Runs the network on all inputs, float32 of the same number of samples. The call sets type, rank and shape of every output, and
   writes its values to `data`, one after another or as its `strides` say. Outputs without `data` are left out; where all
   are, nothing is computed, and the shapes tell how much memory they need. Outputs overlap neither inputs nor one another. */
DSCONV_API dsconv_status dsconv_run(const dsconv_network* network, const dsconv_tensor* inputs, size_t input_count,
                                    dsconv_tensor* outputs, size_t output_count);

#ifdef __cplusplus
}
#endif

#endif /* DSCONV_H */
