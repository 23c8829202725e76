/* Continue a text of token ids in two ways at once, with one read of the weights for both:
 *     tools/build-capi.sh
 *     cc examples/branches.c -Ibuild/capi/include -Lbuild/capi/lib -lcoreinfer -Wl,-rpath,build/capi/lib -o branches
 *     ./branches BUNDLE NUM_TOKENS ID...
 * One way begins with the likeliest token, the other with the likeliest but one. Each line is a token of both. Exit status:
 * 0, 1 where something failed, 2 for wrong arguments.
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#include "coreinfer_engine.h"

static void check(int status) {
  if (status == COREINFER_OK) return;
  fprintf(stderr, "error: %s\n", coreinfer_last_error());
  exit(1);
}

/* The likeliest token but for `without`; -1 leaves out none. */
static int32_t likeliest(const float* logits, int vocab_size, int32_t without) {
  int32_t best = without == 0;
  for (int32_t id = 0; id < vocab_size; ++id)
    if (id != without && logits[id] > logits[best]) best = id;
  return best;
}

int main(int argc, char** argv) {
  if (argc < 4) return fprintf(stderr, "usage: %s BUNDLE NUM_TOKENS ID...\n", argv[0]), 2;
  const size_t num_ids = (size_t)argc - 3;
  int32_t* prompt = malloc(num_ids * sizeof *prompt);
  if (!prompt) return 1;
  for (size_t i = 0; i < num_ids; ++i) prompt[i] = (int32_t)atoi(argv[3 + i]);
  coreinfer_model* model;
  check(coreinfer_open(argv[1], NULL, &model));
  const int vocab_size = coreinfer_vocab_size(model);
  const size_t stride = coreinfer_logits_stride(model);
  float* logits = malloc(2 * stride * sizeof *logits);
  if (!logits) return 1;

  /* The prompt is read once; what follows it has a sequence of its own for each way. */
  check(coreinfer_forward(model, 0, prompt, num_ids, 0, logits, NULL, NULL));
  int32_t sequences[2] = {0}, next[2];
  int other;
  check(coreinfer_fork_sequence(model, 0, (int)num_ids, &other));
  sequences[1] = other;
  next[0] = likeliest(logits, vocab_size, -1);
  next[1] = likeliest(logits, vocab_size, next[0]);
  for (int left = atoi(argv[2]); left > 0; --left) {
    printf("%" PRId32 " %" PRId32 "\n", next[0], next[1]);
    check(coreinfer_forward_rows(model, sequences, next, 2, 0, logits));
    for (int way = 0; way < 2; ++way) next[way] = likeliest(logits + way * stride, vocab_size, -1);
  }
  coreinfer_close(model);
  free(logits);
  free(prompt);
  return 0;
}
