// A file system that refuses some operations below one folder: preloaded into programs under test.
//
// DSTUNE_LIMITED_ROOT: the folder. DSTUNE_LIMITED_REFUSE: append,lock,rename-file,rename-folder,chmod,sync (any of them).
// DSTUNE_LIMITED_KILL_AT: the process is killed when it has opened so many files below the folder for writing, right after
// the last of them was created or emptied.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static atomic_int opened;

static int refuses(const char *operation) {
    const char *list = getenv("DSTUNE_LIMITED_REFUSE");
    size_t length = strlen(operation);
    for (const char *at = list; at && *at; at = strchr(at, ',') ? strchr(at, ',') + 1 : NULL)
        if (!strncmp(at, operation, length) && (at[length] == ',' || !at[length])) return 1;
    return 0;
}

static int below(int folder, const char *path) {
    const char *root = getenv("DSTUNE_LIMITED_ROOT");
    char whole[3 * PATH_MAX], link[64];
    if (!root || !path) return 0;
    if (path[0] == '/') {
        snprintf(whole, sizeof whole, "%s", path);
    } else if (folder == AT_FDCWD) {
        char here[PATH_MAX];
        if (!getcwd(here, sizeof here)) return 0;
        snprintf(whole, sizeof whole, "%s/%s", here, path);
    } else {
        char here[PATH_MAX];
        snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        ssize_t length = readlink(link, here, sizeof here - 1);
        if (length < 0) return 0;
        here[length] = 0;
        snprintf(whole, sizeof whole, "%s/%s", here, path);
    }
    return !strncmp(whole, root, strlen(root)) && (whole[strlen(root)] == '/' || !whole[strlen(root)]);
}

static int file_below(int file) {
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return below(AT_FDCWD, path);
}

static int refuse(void) {
    errno = EOPNOTSUPP;
    return -1;
}

static int after_open(int folder, const char *path, int flags, int file) {
    const char *limit = getenv("DSTUNE_LIMITED_KILL_AT");
    if (file >= 0 && limit && (flags & O_ACCMODE) != O_RDONLY && below(folder, path) && ++opened == atoi(limit)) raise(SIGKILL);
    return file;
}

#define OPEN(name)                                                                       \
    int name(const char *path, int flags, ...) {                                         \
        va_list rest;                                                                    \
        va_start(rest, flags);                                                           \
        mode_t mode = va_arg(rest, mode_t);                                              \
        va_end(rest);                                                                    \
        if ((flags & O_APPEND) && refuses("append") && below(AT_FDCWD, path)) return refuse(); \
        return after_open(AT_FDCWD, path, flags, NEXT(name)(path, flags, mode));         \
    }
#define OPENAT(name)                                                                     \
    int name(int folder, const char *path, int flags, ...) {                             \
        va_list rest;                                                                    \
        va_start(rest, flags);                                                           \
        mode_t mode = va_arg(rest, mode_t);                                              \
        va_end(rest);                                                                    \
        if ((flags & O_APPEND) && refuses("append") && below(folder, path)) return refuse(); \
        return after_open(folder, path, flags, NEXT(name)(folder, path, flags, mode));   \
    }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

int flock(int file, int operation) {
    return refuses("lock") && file_below(file) ? refuse() : NEXT(flock)(file, operation);
}

static int refuses_rename(int folder, const char *from, int to_folder, const char *to) {
    struct stat found;
    if (!below(folder, from) && !below(to_folder, to)) return 0;
    if (fstatat(folder, from, &found, AT_SYMLINK_NOFOLLOW)) return 0;
    return refuses(S_ISDIR(found.st_mode) ? "rename-folder" : "rename-file");
}

int rename(const char *from, const char *to) {
    return refuses_rename(AT_FDCWD, from, AT_FDCWD, to) ? refuse() : NEXT(rename)(from, to);
}

int renameat(int folder, const char *from, int to_folder, const char *to) {
    return refuses_rename(folder, from, to_folder, to) ? refuse() : NEXT(renameat)(folder, from, to_folder, to);
}

int renameat2(int folder, const char *from, int to_folder, const char *to, unsigned flags) {
    return refuses_rename(folder, from, to_folder, to) ? refuse() : NEXT(renameat2)(folder, from, to_folder, to, flags);
}

int chmod(const char *path, mode_t mode) {
    return refuses("chmod") && below(AT_FDCWD, path) ? refuse() : NEXT(chmod)(path, mode);
}

int fchmod(int file, mode_t mode) {
    return refuses("chmod") && file_below(file) ? refuse() : NEXT(fchmod)(file, mode);
}

int fchmodat(int folder, const char *path, mode_t mode, int flags) {
    return refuses("chmod") && below(folder, path) ? refuse() : NEXT(fchmodat)(folder, path, mode, flags);
}

int fsync(int file) {
    return refuses("sync") && file_below(file) ? refuse() : NEXT(fsync)(file);
}
