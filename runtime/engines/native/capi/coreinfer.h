/* CoreInfer in C: open a bundle, choose a pack, decode token ids. No Python is needed.
 *
 * Link with libcoreinfer (tools/build-capi.sh). A bundle is a folder that coreinfer-compile wrote; how text becomes token
 * ids is not part of this: tokenizer/tokenizer.json in the bundle is for the library `tokenizers`, which other languages have.
 *
 *     coreinfer_model *model;
 *     coreinfer_options options = {.struct_bytes = sizeof options};
 *     if (coreinfer_open("bundle", &options, &model) != COREINFER_OK) puts(coreinfer_last_error());
 *
 * Results are to the bit those of the Python engine with the same kernels and number of threads. Several texts at once, and FFN
 * weights by choice, are in coreinfer_engine.h.
 *
 * Errors: functions that can fail return a status and leave a message for coreinfer_last_error. A call that fails changes
 * nothing: neither the model nor what its arguments point to. No C++ exception leaves the library. Functions that return no
 * status must be given an open model.
 *
 * Threads: models are independent of each other. One model serves one thread at a time; of two calls that change it or decode
 * at the same time one returns COREINFER_BUSY. Threads may take turns. coreinfer_close must be the last call. A process that
 * was forked opens its bundles anew. coreinfer_last_error is of the calling thread.
 */
#ifndef COREINFER_H
#define COREINFER_H

#include <stddef.h>
#include <stdint.h>

/* COREINFER_STATIC: the library's sources are part of the program, or of another library, which does not show these names. */
#if defined(__GNUC__) && !defined(COREINFER_STATIC)
#define COREINFER_API __attribute__((visibility("default")))
#else
#define COREINFER_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum {
  COREINFER_OK = 0,
  COREINFER_ARGUMENT = 1,    /* an argument is wrong */
  COREINFER_NOT_FOUND = 2,   /* there is no bundle, or it has no such part */
  COREINFER_VERSION = 3,     /* a bundle of a schema version that this library does not read */
  COREINFER_CORRUPT = 4,     /* a bundle is damaged */
  COREINFER_UNSUPPORTED = 5, /* a model that the engine does not compute; the message names why */
  COREINFER_NO_ROOM = 6,     /* the KV cache, or the model's context, is full */
  COREINFER_MEMORY = 7,      /* the system gives no more memory */
  COREINFER_BUSY = 8,        /* another thread uses the model, or the process was forked */
  COREINFER_NOT_FINITE = 9,  /* logits are NaN or infinite: the model is damaged, or beyond the range of its numbers */
  COREINFER_INTERNAL = 10    /* anything else */
};

/* In place of a cluster's number: the dense FFN. */
#define COREINFER_DENSE (-1)

typedef struct coreinfer_model coreinfer_model;

/* Zero is the default of every field but the first. */
typedef struct coreinfer_options {
  size_t struct_bytes; /* sizeof(coreinfer_options) */
  int num_threads;     /* 1 to 256; default: physical cores that the process may run on */
  const char* isa;     /* kernels, such as "avx2"; default: the best that the CPU has */
  /* Bound of keys and values; default: what the model's whole context takes. Memory is taken as tokens come. More than one
   * context, up to 64, is for several texts (coreinfer_engine.h). */
  uint64_t kv_cache_bytes;
  int skip_checksums; /* 1: compare sizes and shapes, but not what files hold with their SHA-256 */
  /* Bound of weights, read buffers and KV cache in memory; default: none, files are mapped and the system decides which pages
   * stay. Layers, or experts, that do not fit are read from disk for each token. The process's own memory and some 20 MB of the engine's
   * buffers come on top. */
  uint64_t memory_bytes;
} coreinfer_options;

/* Open a bundle: its manifest, base and dense FFN. Cluster packs are opened, and checked, when they are first used.
 * The model begins with the dense FFN; in a bundle without one, with the pack of cluster 0.
 *
 * The manifest itself is checked for what this library reads of it; its own checksum is compared by coreinfer-inspect --verify.
 *
 * options: NULL for the defaults.
 * model: receives the model.
 */
COREINFER_API int coreinfer_open(const char* folder, const coreinfer_options* options, coreinfer_model** model);

/* Free a model; NULL is allowed. */
COREINFER_API void coreinfer_close(coreinfer_model* model);

/* Why the last call of this thread that failed did so, in one line of UTF-8; "" before any has. Good until the next call. */
COREINFER_API const char* coreinfer_last_error(void);

COREINFER_API int coreinfer_vocab_size(const coreinfer_model* model);
COREINFER_API int coreinfer_num_clusters(const coreinfer_model* model);
/* What a cluster's texts are about, in UTF-8; NULL where there is no such cluster. Good until the model is closed. */
COREINFER_API const char* coreinfer_cluster_label(const coreinfer_model* model, int cluster);
/* 1 where the bundle has the dense FFN. */
COREINFER_API int coreinfer_has_dense(const coreinfer_model* model);
/* 1 for a token that ends a text, such as </s>. */
COREINFER_API int coreinfer_is_end(const coreinfer_model* model, int32_t token_id);
/* Name of the kernels in use, and the threads that decode. */
COREINFER_API const char* coreinfer_isa(const coreinfer_model* model);
COREINFER_API int coreinfer_num_threads(const coreinfer_model* model);

/* Decode with a cluster's pack, or with the dense FFN, from the next token on; what was read stays. Of a thin cluster that is the
 * dense FFN, of which this library leaves nothing out. CoreInfer's own runtime
 * reads a prompt with the dense FFN where there is one, and then decodes with the pack of the prompt's cluster. */
COREINFER_API int coreinfer_use(coreinfer_model* model, int cluster);

/* Say that a pack decodes soon, before a prompt is read: under a limit of memory its layers come in while the prompt is read,
 * as far as there is room. It is opened and checked here, if it has not been. */
COREINFER_API int coreinfer_prepare(coreinfer_model* model, int cluster);

/* Bytes read from disk under a limit of memory since the model was opened; 0 without a limit. */
COREINFER_API uint64_t coreinfer_bytes_read(const coreinfer_model* model);

/* Read tokens after those that were read before.
 *
 * token_ids: num_ids of them, at least one, each from 0 to coreinfer_vocab_size - 1.
 * logits: receives coreinfer_vocab_size floats, of the token after the last one; NULL if they are not wanted.
 */
COREINFER_API int coreinfer_feed(coreinfer_model* model, const int32_t* token_ids, size_t num_ids, float* logits);

/* The same, for the likeliest token; of equal ones the lowest. This is faster than to look for it in the logits: an int8 head is
 * read in half where that is enough. The tokens are read even where COREINFER_NOT_FINITE is returned. */
COREINFER_API int coreinfer_feed_greedy(coreinfer_model* model, const int32_t* token_ids, size_t num_ids,
                                        int32_t* next_id);

/* Tokens that were read and are in the KV cache, and the most that there may be. */
COREINFER_API int coreinfer_num_tokens(const coreinfer_model* model);
COREINFER_API int coreinfer_max_tokens(const coreinfer_model* model);

/* Keep only the first tokens; 0 begins a new text. More than there are is an error. */
COREINFER_API int coreinfer_truncate(coreinfer_model* model, int num_tokens);

#ifdef __cplusplus
}
#endif

#endif
