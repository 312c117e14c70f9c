/* The change of llama.cpp's pull request 25844, without building it anew: cc -shared -fPIC -o class_token.so class_token.c

   Loaded before llama.cpp's libraries (LD_PRELOAD), it puts CLIP's class token in front of the patches, where the
   positions and the rows that the projector reads expect it. tools/mtmd/models/llava.cpp puts it behind them. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <string.h>

void * ggml_concat(void * context, void * a, void * b, int dimension) {
    void * (*concat)(void *, void *, void *, int) = dlsym(RTLD_NEXT, "ggml_concat");
    if (concat == NULL) {  /* llama.cpp's libraries were opened later */
        concat = dlsym(dlopen("libggml-base.so.0", RTLD_LAZY | RTLD_NOLOAD), "ggml_concat");
    }
    const char * (*name)(const void *) = dlsym(dlopen("libggml-base.so.0", RTLD_LAZY | RTLD_NOLOAD), "ggml_get_name");
    int class_token = dimension == 1 && strcmp(name(b), "v.class_embd") == 0;
    return class_token ? concat(context, b, a, dimension) : concat(context, a, b, dimension);
}
