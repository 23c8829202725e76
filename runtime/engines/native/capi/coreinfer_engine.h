/* The engine under coreinfer.h: several texts at once, FFN weights by choice, files that the caller opens. CoreInfer's
 * Python runtime is made of these functions.
 *
 *     int other;
 *     coreinfer_fork_sequence(model, 0, coreinfer_num_tokens(model), &other);     (the same text, twice)
 *     int32_t sequences[] = {0, other}, ids[] = {510, 253};                       (that goes on in two ways)
 *     float *logits = malloc(2 * coreinfer_logits_stride(model) * sizeof *logits);
 *     coreinfer_forward_rows(model, sequences, ids, 2, 0, logits);                (with one read of the weights)
 *
 * Compatibility: coreinfer.h stays as it is, this header follows the library's version. Compile with the one that was installed
 * with the library; functions here may change from one version to the next.
 *
 * Errors and threads are as coreinfer.h says, with two differences. Logits are computed in place, so that after a call that
 * failed they may hold anything. Functions that are marked so may be called while another thread decodes with the model.
 * Callbacks run in the thread of the call that they were given to; they must return, and not call functions of the same model
 * but those that say something of it.
 *
 * Models are opened by coreinfer_open, or by coreinfer_open_files. Of one that was opened by the latter the library knows
 * no bundle: it has no clusters, no dense FFN and no ends of texts by coreinfer.h's functions, and coreinfer_use_ffn must
 * come before the first pass. All other functions of both headers are for either.
 */
#ifndef COREINFER_ENGINE_H
#define COREINFER_ENGINE_H

#include "coreinfer.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Statuses besides those of coreinfer.h, whose functions never return them. */
enum {
  COREINFER_STOPPED = 11,         /* a callback said so */
  COREINFER_NO_ADDRESS_SPACE = 12 /* the system reserves no addresses for so large a KV cache */
};

enum {
  COREINFER_BLOCK_TOKENS = 256,       /* tokens of a prompt that share one read of the weights */
  COREINFER_PAGE_TOKENS = 64,         /* tokens that a page of the KV cache has room for */
  COREINFER_NUM_INPUT_GROUPS = 4,     /* groups of a layer's matrices that have the same inputs, see below */
  COREINFER_LEAST_COLUMN_BYTES = 1024 /* of a column that may be worth leaving out on some machine */
};

/* Files */

/* A whole tensor file of a bundle (docs/format.md), in memory. It is read in place for as long as a model or an FFN is in use
 * that was made of it; then `release` is called once. */
typedef struct coreinfer_file {
  const char* name;    /* said where something is wrong with it, such as its path; not kept */
  const uint8_t* data; /* at an address that is a multiple of 64 */
  size_t num_bytes;
  /* Called in whichever thread lets go of the file last; NULL: `data` outlives all that is made of it. Not called where the call
   * that the file is given to fails: it stays the caller's. */
  void (*release)(void* owner);
  void* owner;
} coreinfer_file;

/* What the number of pages may depend on, in bytes. */
typedef struct coreinfer_sizes {
  size_t page;        /* keys and values of COREINFER_PAGE_TOKENS tokens */
  size_t tables;      /* of the base, tables of which a token needs a few rows only */
  size_t table_block; /* most that a block of 16 rows of such a table takes in whole sectors of the disk */
} coreinfer_sizes;

/* Zero is the default of every field but the first. */
typedef struct coreinfer_engine_options {
  size_t struct_bytes; /* sizeof(coreinfer_engine_options) */
  int num_threads;     /* as in coreinfer_options */
  const char* isa;     /* the same; "auto" is the default too */
  /* Returns how many pages the KV cache has, at least 1; called once. Anything below 1 ends the opening with
   * COREINFER_ARGUMENT. Default: as many as the model's whole context takes. */
  int (*count_pages)(void* user, const coreinfer_sizes* sizes);
  void* user; /* given to count_pages */
} coreinfer_engine_options;

/* Put a model together from its base. Checksums are the caller's to compare.
 *
 * record: the field "model" of the bundle's manifest, JSON in UTF-8.
 * base: base.safetensors.
 * options: NULL for the defaults.
 * model: receives the model, which no FFN is in use of. coreinfer_close frees it.
 * COREINFER_ARGUMENT also where the file is damaged or does not hold what the record says.
 */
COREINFER_API int coreinfer_open_files(const char* record, const coreinfer_file* base,
                                       const coreinfer_engine_options* options, coreinfer_model** model);

/* Limit the memory of the weights, before an FFN is used: the base is brought in and kept, layers of FFNs, or of mixtures each
 * expert, are read from disk for the pass that needs them and kept as far as there is room. coreinfer_open does all this for
 * `memory_bytes`.
 *
 * path: of the file that the model's base is all of.
 * layer_bytes: for layers of FFNs, at least two of the largest; or for experts, at least one. With room for less than the
 * experts of a token, a token is computed in pieces.
 * window_bytes: for rows of coreinfer_sizes.tables; 0 to keep these tables as a whole.
 */
COREINFER_API int coreinfer_limit_memory(coreinfer_model* model, const char* path, size_t layer_bytes,
                                         size_t window_bytes);

/* FFN weights of all layers */

typedef struct coreinfer_ffn coreinfer_ffn;

/* Some ids of one layer. */
typedef struct coreinfer_ids {
  const int32_t* ids;
  size_t num_ids;
} coreinfer_ids;

/* The dense FFN or a cluster's pack, in place. COREINFER_ARGUMENT also where the file does not hold it.
 *
 * record: as in coreinfer_open_files.
 * num_neurons: num_layers of them, the neurons of each layer.
 * ffn: receives the FFN, which coreinfer_close_ffn frees. Of coreinfer_read_experts: that of a mixture of experts, where the
 * neurons of a layer are those of all its experts together; a pack that lists narrower ones has these alone.
 */
COREINFER_API int coreinfer_read_ffn(const char* record, const coreinfer_file* file, const int* num_neurons,
                                     size_t num_layers, coreinfer_ffn** ffn);
COREINFER_API int coreinfer_read_experts(const char* record, const coreinfer_file* file, const int* num_neurons,
                                         size_t num_layers, coreinfer_ffn** ffn);

/* The FFN of a cluster, or of COREINFER_DENSE, in a model that coreinfer_open has opened; read and checked here if it has
 * not been. */
COREINFER_API int coreinfer_pack(coreinfer_model* model, int cluster, coreinfer_ffn** ffn);

/* A mixture's pack that names experts: the same weights, without the experts that are left out.
 *
 * layers: num_layers of them, numbers of the experts that stay in each.
 */
COREINFER_API int coreinfer_keep_experts(const coreinfer_ffn* all, const coreinfer_ids* layers, size_t num_layers,
                                         coreinfer_ffn** ffn);

/* Some neurons of an FFN, as a copy. Down projections in int8 and int4 become int8, whose scales are their own.
 *
 * layers: num_layers of them, the neurons of each, ascending; at least one a layer. Those of experts are numbered through, all of
 * the first expert come first; experts of which none is picked are left out, and the others have as many each.
 */
COREINFER_API int coreinfer_gather_neurons(const coreinfer_ffn* from, const coreinfer_ids* layers, size_t num_layers,
                                           coreinfer_ffn** ffn);

/* The same FFN, to be read layer by layer from disk, of mixtures expert by expert, as a model needs whose memory is limited. Not
 * what coreinfer_gather_neurons has made. What coreinfer_keep_experts makes of it shares the experts that are in memory.
 *
 * path: of the file that the FFN was read from.
 */
COREINFER_API int coreinfer_read_in_layers(const coreinfer_ffn* from, const char* path, coreinfer_ffn** ffn);

/* Free an FFN; NULL is allowed. A model that uses it keeps what it needs of it. */
COREINFER_API void coreinfer_close_ffn(coreinfer_ffn* ffn);

/* The most neurons of a layer, or of an expert. */
COREINFER_API int coreinfer_max_neurons(const coreinfer_ffn* ffn);

/* Decode with an FFN from the next token on; what was read stays.
 *
 * thresholds: (num_layers, COREINFER_NUM_INPUT_GROUPS, 2) floats: in each layer and group, tokens leave out the inputs whose
 * score is at most the first, and read the two high bits alone of the weights of those whose score is at most the second
 * (docs/token_shares.md). Numbers below 0: all is read. The second must be equal to the first where weights are not int4, of
 * experts, and where columns are laid out without COREINFER_HALVES. NULL: all inputs are read.
 */
COREINFER_API int coreinfer_use_ffn(coreinfer_model* model, const coreinfer_ffn* ffn, const float* thresholds,
                                    size_t num_layers);

/* Say that an FFN decodes soon: under a limit of memory its layers or experts come in as far as there is room. May be called while
 * another thread decodes. */
COREINFER_API int coreinfer_announce_ffn(coreinfer_model* model, const coreinfer_ffn* ffn);

/* Whether all of an FFN is in memory: `holds` receives 1 or 0. Without a limit of memory it is. May be called while another
 * thread decodes. */
COREINFER_API int coreinfer_holds_ffn(const coreinfer_model* model, const coreinfer_ffn* ffn, int* holds);

/* Sequences: texts that are read side by side. Number 0 is always there, and is the one of coreinfer.h's functions. All share
 * the pages of the KV cache. */

/* Begin an empty one. sequence: receives its number, which may be that of one that was dropped. */
COREINFER_API int coreinfer_add_sequence(coreinfer_model* model, int* sequence);

/* Begin one with the first tokens of another; whole pages are shared.
 *
 * num_tokens: 0 to as many as `source` has.
 * COREINFER_NO_ROOM where no page is free that is needed.
 */
COREINFER_API int coreinfer_fork_sequence(coreinfer_model* model, int source, int num_tokens, int* sequence);

/* Free a sequence's pages and its number. Sequence 0 cannot be dropped. */
COREINFER_API int coreinfer_drop_sequence(coreinfer_model* model, int sequence);

/* Keep only the first tokens; where there are no more than num_tokens, all. */
COREINFER_API int coreinfer_truncate_sequence(coreinfer_model* model, int sequence, int num_tokens);

/* Tokens that were read and are in the KV cache. num_tokens: receives them. May be called while another thread decodes. */
COREINFER_API int coreinfer_num_cached(const coreinfer_model* model, int sequence, int* num_tokens);

/* Pages of the KV cache, those that no sequence has, and the bytes of a page. May be called while another thread decodes. */
COREINFER_API int coreinfer_num_pages(const coreinfer_model* model);
COREINFER_API int coreinfer_num_free_pages(const coreinfer_model* model);
COREINFER_API size_t coreinfer_page_bytes(const coreinfer_model* model);

/* Passes: tokens are appended to sequences. Ids are from 0 to coreinfer_vocab_size - 1. Logits are rows of floats, the
 * coreinfer_vocab_size of the token after the row's; from one row to the next it is coreinfer_logits_stride floats, of which
 * those behind the vocabulary may be written too.
 *
 * COREINFER_ARGUMENT also where the model's context has no room for the tokens, COREINFER_NO_ROOM where too few pages are
 * free: then other sequences must be dropped or truncated. */

/* Floats from a row of logits to the next: the vocabulary in whole blocks of 16. */
COREINFER_API size_t coreinfer_logits_stride(const coreinfer_model* model);

/* Flags of a pass. */
enum {
  COREINFER_ALL_LOGITS = 1,  /* a row for each token of coreinfer_forward, not for the last one alone */
  COREINFER_LAST_LOGITS = 2, /* a row for the last token of coreinfer_forward_beside's block too, before the others */
  COREINFER_SCREENED = 4     /* logits of tokens that can hardly be the likeliest may be approximate, where the head is
                                int8: it is read in half then. For greedy decoding. */
};

/* What a layer's FFN, or one of its experts, did with the tokens of a block that came to it. Good until the watcher returns. */
typedef struct coreinfer_watched {
  int layer, expert; /* 0 where the FFN is one */
  int num_tokens, stride;
  /* (num_tokens, stride): inputs of the down projection; behind the neurons anything may lie. */
  const float* activations;
  const float* weights; /* (num_tokens): of an expert what the router multiplies its outputs by; else NULL */
} coreinfer_watched;

/* Called for each layer of each block of tokens, in their order, of experts for each that any token chose. Returns 0, or anything
 * else to end: it is not called again, and the pass takes its tokens back and returns COREINFER_STOPPED. */
typedef int (*coreinfer_watcher)(void* user, const coreinfer_watched* seen);

/* Append tokens to one sequence: one token as a step of decoding, more as a prompt.
 *
 * ids: num_ids of them, at least one.
 * flags: COREINFER_ALL_LOGITS, COREINFER_SCREENED.
 * logits: one row, or with COREINFER_ALL_LOGITS num_ids rows; NULL if they are not wanted, without that flag.
 * watcher: NULL for none; with one, one token is read as a prompt is.
 */
COREINFER_API int coreinfer_forward(coreinfer_model* model, int sequence, const int32_t* ids, size_t num_ids, int flags,
                                    float* logits, coreinfer_watcher watcher, void* user);

/* Append tokens to several sequences, those of one sequence in their order, with one read of the weights for
 * COREINFER_BLOCK_TOKENS of them. A row's logits are to the bit what coreinfer_forward gives for that token alone.
 *
 * sequences, ids: num_rows of each, at least one.
 * flags: COREINFER_SCREENED.
 * logits: num_rows rows.
 */
COREINFER_API int coreinfer_forward_rows(coreinfer_model* model, const int32_t* sequences, const int32_t* ids,
                                         size_t num_rows, int flags, float* logits);

/* coreinfer_forward for two or more tokens of a prompt, and coreinfer_forward_rows for others, with one read of the weights
 * where COREINFER_BLOCK_TOKENS hold them all.
 *
 * flags: COREINFER_LAST_LOGITS, COREINFER_SCREENED.
 * logits: num_rows rows, and one before them with COREINFER_LAST_LOGITS.
 */
COREINFER_API int coreinfer_forward_beside(coreinfer_model* model, int sequence, const int32_t* block_ids,
                                           size_t num_block_ids, const int32_t* sequences, const int32_t* ids,
                                           size_t num_rows, int flags, float* logits);

/* Columns: weights in int4, int8 or bfloat16 that also lie input by input in memory, so that inputs that a token leaves out need
 * not be read. */

/* Groups of a layer's matrices that have the same inputs, as bits. */
enum {
  COREINFER_QKV = 1,     /* query, key and value */
  COREINFER_HEADS = 2,   /* attention's output */
  COREINFER_GATE_UP = 4, /* gate and up */
  COREINFER_DOWN = 8,
  COREINFER_HALVES = 16 /* no group: high and low bits apart, so that tokens may read the high ones alone */
};

/* From the next coreinfer_use_ffn with thresholds on, weights lie input by input too. Not under a limit of memory.
 *
 * groups: which, or-ed; with COREINFER_HALVES int4 lies in two planes, but for experts.
 * least_bytes: groups with shorter columns are read as ever; COREINFER_LEAST_COLUMN_BYTES is meant for real models.
 */
COREINFER_API int coreinfer_lay_out_columns(coreinfer_model* model, int groups, size_t least_bytes);

/* Try whether this machine gains, with the FFN in use, in some tens of milliseconds.
 *
 * share: of the weights that a token reads, above 0 and at most 1.
 * flags: COREINFER_HALVES to try planes, and inputs that read the high bits alone.
 * gains: receives COREINFER_NUM_INPUT_GROUPS numbers, in the order of the bits: how many times as fast a group is by columns;
 * 0 where it cannot have any, and under a limit of memory.
 */
COREINFER_API int coreinfer_try_columns(coreinfer_model* model, double share, int flags, double* gains);

/* Bytes that columns take in memory. */
COREINFER_API size_t coreinfer_column_bytes(const coreinfer_model* model);

/* Figures. All but coreinfer_bytes_per_token and coreinfer_column_bytes may be called while another thread decodes. */

COREINFER_API int coreinfer_num_layers(const coreinfer_model* model);
/* 1 for a layer whose keys and values are kept in float32, because fp16 does not hold them; 0 where there is no such layer. */
COREINFER_API int coreinfer_is_wide(const coreinfer_model* model, int layer);

/* What was read from disk since memory was limited. */
typedef struct coreinfer_reads {
  uint64_t layer_bytes;  /* of FFN layers, or of experts */
  uint64_t num_hits;     /* layers, of mixtures experts, that were there when a pass came to them */
  uint64_t num_misses;   /* that were not */
  double waited_seconds; /* for those */
  uint64_t table_bytes;  /* of rows of tables, at most */
} coreinfer_reads;

/* 1, and `reads` receives the figures; 0 where memory is not limited, and nothing is written. */
COREINFER_API int coreinfer_read_figures(const coreinfer_model* model, coreinfer_reads* reads);
/* Bytes of FFN layers or experts in memory; 0 where memory is not limited. */
COREINFER_API size_t coreinfer_layer_bytes_used(const coreinfer_model* model);

/* Bytes of weights and of num_tokens tokens' keys and values that one more token reads. Of weights of which tokens leave out
 * some, what the last single token read; all before the first one.
 *
 * flags: COREINFER_SCREENED.
 * alone: 0 for a token that shares its pass with others, which reads all inputs' weights.
 * num_bytes: receives them.
 */
COREINFER_API int coreinfer_bytes_per_token(const coreinfer_model* model, int num_tokens, int flags, int alone,
                                            size_t* num_bytes);

#ifdef __cplusplus
}
#endif

#endif
