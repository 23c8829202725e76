/* Continue a text of token ids:
 *     tools/build-capi.sh
 *     cc examples/generate.c -Ibuild/capi/include -Lbuild/capi/lib -lcoreinfer -Wl,-rpath,build/capi/lib -o generate
 *     ./generate BUNDLE CLUSTER NUM_TOKENS ID...
 * The prompt is read with the dense FFN where the bundle has it. CLUSTER decodes: a cluster's number, or -1 for the dense
 * FFN. Greedy; ends at a token that ends the text. Exit status: 0, 1 where something failed, 2 for wrong arguments.
 */
#include <errno.h>
#include <inttypes.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>

#include "coreinfer.h"

static int failed(void) {
  fprintf(stderr, "error: %s\n", coreinfer_last_error());
  return 1;
}

/* The number in `text`, or the end of the program. */
static int number_of(const char* text) {
  char* end;
  errno = 0;
  long value = strtol(text, &end, 10);
  if (end == text || *end || errno || value < INT_MIN || value > INT_MAX) {
    fprintf(stderr, "error: expected a number, got '%s'\n", text);
    exit(2);
  }
  return (int)value;
}

/* Decode from `next` on, the first token, and print each. */
static int decode(coreinfer_model* model, int32_t next, int num_tokens) {
  for (int i = 1;; ++i) {
    printf("%" PRId32 "\n", next);
    if (i == num_tokens || coreinfer_is_end(model, next)) return 0;
    if (coreinfer_feed_greedy(model, &next, 1, &next) != COREINFER_OK) return failed();
  }
}

int main(int argc, char** argv) {
  if (argc < 5) return fprintf(stderr, "usage: %s BUNDLE CLUSTER NUM_TOKENS ID...\n", argv[0]), 2;
  int cluster = number_of(argv[2]), num_tokens = number_of(argv[3]), num_ids = argc - 4;
  int32_t *ids = malloc((size_t)num_ids * sizeof *ids), next;
  if (!ids) return 1;
  for (int i = 0; i < num_ids; ++i) ids[i] = number_of(argv[4 + i]);
  coreinfer_model* model = NULL;
  int status = 0;
  if (coreinfer_open(argv[1], NULL, &model) != COREINFER_OK ||
      (!coreinfer_has_dense(model) && coreinfer_use(model, cluster) != COREINFER_OK) ||
      coreinfer_feed_greedy(model, ids, (size_t)num_ids, &next) != COREINFER_OK ||
      coreinfer_use(model, cluster) != COREINFER_OK)
    status = failed();
  else if (num_tokens > 0)
    status = decode(model, next, num_tokens);
  coreinfer_close(model);
  free(ids);
  return status;
}
