/*
 * bkpack: packed language models, read and multiplied as they lie on disk.
 *
 * All calls but bkpack_version() and bkpack_last_error() return a bkpack_status. BKPACK_STATUS_OK is 0; after any other,
 * bkpack_last_error() says in one sentence what was wrong, outputs are as they were, and the model can go on being used.
 *
 * Threads: any number of threads may use one model at once; only bkpack_close() must come after all of them. Threads that
 * the library starts stay until the process ends, so it must not be unloaded (dlclose). A process that forks without exec
 * has none of them: in the child, multiply on the calling thread alone, and do not call bkpack_verify(), which would wait
 * for them forever if the parent had started them.
 *
 * Pointers: an argument that is NULL, too short or misaligned is refused with BKPACK_STATUS_ARGUMENT. One that is neither
 * NULL nor valid cannot be told apart from a valid one: as everywhere in C, the behaviour is undefined. Strings are UTF-8
 * and end in NUL. What a call hands out (names, shapes, bytes of parts) belongs to the model and lives until
 * bkpack_close(); never free it, never write to it.
 *
 * Growth: structures only ever grow at their end. Calls that fill one take its size, sizeof(*it), so that a program and a
 * library of different ages understand each other; a member that the library does not know is set to zero. Enumerations
 * may gain values.
 *
 * Generated from the Rust source by cbindgen; do not edit.
 */


#ifndef BKPACK_H
#define BKPACK_H

#include <stddef.h>
#include <stdint.h>

/**
 * What became of a call.
 */
enum bkpack_status
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  BKPACK_STATUS_OK = 0,
  /**
   * An argument is NULL, out of range, too short, misaligned, or not UTF-8.
   */
  BKPACK_STATUS_ARGUMENT = 1,
  /**
   * The model has no tensor or file of this name, or no config.json.
   */
  BKPACK_STATUS_NOT_FOUND = 2,
  /**
   * The operating system refused: no such file, no permission, no more threads.
   */
  BKPACK_STATUS_SYSTEM = 3,
  /**
   * The file is not a packed model, or one whose bytes break a rule of the format.
   */
  BKPACK_STATUS_MODEL = 4,
  /**
   * A mistake in bkpack. The model may still be used and must still be closed.
   */
  BKPACK_STATUS_INTERNAL = 5,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum bkpack_status bkpack_status;
#else
typedef int32_t bkpack_status;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/**
 * How the weights of a tensor are stored.
 */
enum bkpack_kind
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : uint32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  /**
   * Plain values.
   */
  BKPACK_KIND_FLOAT = 0,
  /**
   * 2 to 8 bits on an even grid.
   */
  BKPACK_KIND_INT = 1,
  /**
   * {-1, 0, +1} times a scale, five to a byte.
   */
  BKPACK_KIND_TERNARY = 2,
  /**
   * {-1, +1} times a scale.
   */
  BKPACK_KIND_BINARY = 3,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum bkpack_kind bkpack_kind;
#else
typedef uint32_t bkpack_kind;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/**
 * The type of stored numbers, little-endian.
 */
enum bkpack_dtype
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : uint32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  BKPACK_DTYPE_F32 = 0,
  BKPACK_DTYPE_F16 = 1,
  BKPACK_DTYPE_BF16 = 2,
  BKPACK_DTYPE_U8 = 3,
  BKPACK_DTYPE_U32 = 4,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum bkpack_dtype bkpack_dtype;
#else
typedef uint32_t bkpack_dtype;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/**
 * What a part is to its tensor.
 */
enum bkpack_role
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : uint32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  /**
   * The values themselves; the only part of a tensor that is not quantized.
   */
  BKPACK_ROLE_VALUES = 0,
  /**
   * The codes, row by row; each row fills whole 32-bit words (ternary: bytes), first column in the lowest bits.
   */
  BKPACK_ROLE_PACKED = 1,
  /**
   * A scale for each group of each row.
   */
  BKPACK_ROLE_SCALE = 2,
  /**
   * A zero point for each group of each row, as wide as a code; each row fills whole 32-bit words.
   */
  BKPACK_ROLE_ZERO_POINT = 3,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum bkpack_role bkpack_role;
#else
typedef uint32_t bkpack_role;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/**
 * An open packed model.
 */
typedef struct bkpack_model bkpack_model;

/**
 * The encoding of a tensor.
 */
typedef struct bkpack_encoding {
  bkpack_kind kind;
  /**
   * Bits of a code: 2 to 8 for integers, 1 for binary; 0 for ternary (five codes to a byte) and plain values.
   */
  uint32_t bits;
  /**
   * 0 where each group has a zero point of its own, 1 elsewhere.
   */
  uint32_t symmetric;
  /**
   * The type of the scales, or of plain values.
   */
  bkpack_dtype dtype;
  /**
   * Columns that share a scale, at least 1; the last group of a row may be shorter. 0 for plain values.
   */
  uint64_t group_size;
} bkpack_encoding;

/**
 * One stored part of a tensor, in the file's memory map.
 */
typedef struct bkpack_part {
  bkpack_role role;
  bkpack_dtype dtype;
  /**
   * Its name in the file, which any safetensors reader lists.
   */
  const char *name;
  /**
   * Its bytes, read-only, aligned to their dtype.
   */
  const void *data;
  /**
   * The number of bytes.
   */
  size_t length;
} bkpack_part;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/**
 * The version of the library, e.g. "0.1.0".
 */
const char *bkpack_version(void);

/**
 * What was wrong with the last call on this thread that failed: one sentence in UTF-8, empty if none has failed. It is
 * valid until the next call that fails on this thread, or until the thread ends; calls that succeed leave it alone.
 */
const char *bkpack_last_error(void);

/**
 * Opens a packed file, or a sharded model by its index, and maps it into memory. Headers are read and checked, weights
 * are not: bkpack_verify() does that. On failure *model becomes NULL.
 *
 * The file may be deleted or replaced by renaming while it is open, but must not be written to or cut short.
 */
bkpack_status bkpack_open(const char *file,
                          struct bkpack_model **model);

/**
 * Closes a model and unmaps it. Nothing it handed out may be used any more, and no other call with it may be running.
 * NULL is ignored.
 */
bkpack_status bkpack_close(struct bkpack_model *model);

/**
 * Reads every byte and checks it against the hashes in the file, on all processors.
 */
bkpack_status bkpack_verify(const struct bkpack_model *model);

/**
 * The model's config.json, as JSON on one line. BKPACK_STATUS_NOT_FOUND if it carries none.
 */
bkpack_status bkpack_config(const struct bkpack_model *model, const char **json);

/**
 * What the file says of itself, as JSON on one line: version, producer, source, policy, config, activations. Tensors and
 * files, which the manifest names too, are told by the calls below.
 */
bkpack_status bkpack_manifest(const struct bkpack_model *model,
                              const char **json);

/**
 * The number of files that travel in the model, such as tokenizer.json.
 */
bkpack_status bkpack_file_count(const struct bkpack_model *model, size_t *count);

/**
 * The index of the travelling file of this name. BKPACK_STATUS_NOT_FOUND if there is none.
 */
bkpack_status bkpack_file_find(const struct bkpack_model *model, const char *name, size_t *index);

/**
 * A travelling file: its name and its bytes in the memory map. The bytes do not end in NUL.
 */
bkpack_status bkpack_file(const struct bkpack_model *model,
                          size_t index,
                          const char **name,
                          const void **data,
                          size_t *length);

/**
 * The number of tensors. A complex tensor X counts as two, X.real and X.imag.
 */
bkpack_status bkpack_tensor_count(const struct bkpack_model *model, size_t *count);

/**
 * The index of the tensor of this name. BKPACK_STATUS_NOT_FOUND if there is none.
 */
bkpack_status bkpack_tensor_find(const struct bkpack_model *model,
                                 const char *name,
                                 size_t *tensor);

/**
 * The name of a tensor. Tensors are counted from 0, in the order of their names, numbers in them by value.
 */
bkpack_status bkpack_tensor_name(const struct bkpack_model *model,
                                 size_t tensor,
                                 const char **name);

/**
 * The dimensions of a tensor, outermost first: dims[0] to dims[count - 1]. A scalar has none, and dims is NULL then.
 */
bkpack_status bkpack_tensor_shape(const struct bkpack_model *model,
                                  size_t tensor,
                                  const size_t **dims,
                                  size_t *count);

/**
 * A tensor's shape as a matrix, which is how its rows are counted: the last dimension is the columns, all others
 * together are the rows. A vector is one row.
 */
bkpack_status bkpack_tensor_matrix(const struct bkpack_model *model,
                                   size_t tensor,
                                   size_t *rows,
                                   size_t *columns);

/**
 * How a tensor is encoded. size is sizeof(*encoding).
 */
bkpack_status bkpack_tensor_encoding(const struct bkpack_model *model,
                                     size_t tensor,
                                     struct bkpack_encoding *encoding,
                                     size_t size);

/**
 * How a tensor is encoded, for people: "INT4 g128", "INT3 asym g64", "ternary g128", "BF16".
 */
bkpack_status bkpack_tensor_encoding_text(const struct bkpack_model *model,
                                          size_t tensor,
                                          const char **encoding);

/**
 * The number of stored parts of a tensor: 1 where it holds plain values, else 2, or 3 with zero points.
 */
bkpack_status bkpack_tensor_part_count(const struct bkpack_model *model,
                                       size_t tensor,
                                       size_t *count);

/**
 * One stored part of a tensor, in the file's memory map: nothing is copied. size is sizeof(*part).
 *
 * A part other than plain values is a matrix with the tensor's rows; what its words hold is in spec/bkpack-v1.md.
 */
bkpack_status bkpack_tensor_part(const struct bkpack_model *model,
                                 size_t tensor,
                                 size_t index,
                                 struct bkpack_part *part,
                                 size_t size);

/**
 * Dequantizes some rows of a tensor (see bkpack_tensor_matrix()), on the calling thread, bit for bit as the format
 * defines the values: values[i * columns + j] becomes element j of row first_row + i.
 *
 * length is the number of floats that values has room for, at least rows * columns. Other threads may dequantize other
 * rows at the same time.
 */
bkpack_status bkpack_dequantize(const struct bkpack_model *model,
                                size_t tensor,
                                size_t first_row,
                                size_t rows,
                                float *values,
                                size_t length);

/**
 * Multiplies a tensor as a matrix W (see bkpack_tensor_matrix()) with a vector: y = W x, in f32, x taken as it is. The
 * result has the same bits for any number of threads and on every instruction set.
 *
 * x_length must be the number of columns, and y has room for y_length floats, at least the number of rows; x and y must
 * not overlap. threads is 1 to compute on the calling thread alone, so that several threads that multiply at once are not
 * in one another's way; 0 for as many threads as there are processors; otherwise their number, up to 1024. Calls with the
 * same number share their threads, which are started on first use and kept.
 */
bkpack_status bkpack_matvec(const struct bkpack_model *model,
                            size_t tensor,
                            const float *x,
                            size_t x_length,
                            float *y,
                            size_t y_length,
                            size_t threads);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* BKPACK_H */
