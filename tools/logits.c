/* Every call's logits of some prompts, for tools/compare_logits.py: logits BUNDLE NUM_THREADS <PROMPTS >LOGITS
 *
 * PROMPTS: numbers in text. For each prompt the cluster that decodes, how many token ids are read as one call by the FFN that the
 * bundle begins with, and these; then how many the cluster reads after that, one a call, and these.
 * LOGITS: for each call the floats of the vocabulary, as they are in memory.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include "coreinfer.h"

static void refuse(const char* message) {
  fprintf(stderr, "error: %s\n", message);
  exit(1);
}

static void check(int status) {
  if (status != COREINFER_OK) refuse(coreinfer_last_error());
}

static int32_t number(void) {
  int value;
  if (scanf("%d", &value) != 1) refuse("PROMPTS: expected a number, got the end or another text");
  return value;
}

static void* room(size_t bytes) {
  void* found = malloc(bytes);
  if (!found) refuse("no memory");
  return found;
}

/* Read `num_ids` ids in one call, and write the logits. */
static void feed(coreinfer_model* model, size_t num_ids, float* logits) {
  int32_t* ids = room(num_ids * sizeof *ids);
  for (size_t i = 0; i < num_ids; ++i) ids[i] = number();
  check(coreinfer_feed(model, ids, num_ids, logits));
  free(ids);
  const size_t count = (size_t)coreinfer_vocab_size(model);
  if (fwrite(logits, sizeof *logits, count, stdout) != count) refuse("LOGITS: cannot be written");
}

int main(int argc, char** argv) {
  if (argc != 3) refuse("usage: logits BUNDLE NUM_THREADS <PROMPTS >LOGITS");
  coreinfer_model* model;
  const coreinfer_options options = {.struct_bytes = sizeof options, .num_threads = atoi(argv[2])};
  check(coreinfer_open(argv[1], &options, &model));
  fprintf(stderr, "kernels: %s\n", coreinfer_isa(model));
  float* logits = room((size_t)coreinfer_vocab_size(model) * sizeof *logits);
  for (int cluster; scanf("%d", &cluster) == 1;) {
    check(coreinfer_truncate(model, 0));
    check(coreinfer_use(model, coreinfer_has_dense(model) ? COREINFER_DENSE : 0));
    feed(model, (size_t)number(), logits);
    check(coreinfer_use(model, cluster));
    for (int left = number(); left > 0; --left) feed(model, 1, logits);
  }
  free(logits);
  coreinfer_close(model);
  return 0;
}
