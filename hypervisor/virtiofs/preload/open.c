/*
 * Preloaded into QEMU's virtiofsd, the one in C.
 *
 * A guest that creates a file without O_EXCL has virtiofsd create it with O_EXCL.
 * Where somebody else made it first, virtiofsd opens what is there, by its descriptor
 * below /proc/self/fd, with the guest's flags: O_CREAT is still one of them, and there
 * is no mode. glibc's checked open ends the program for that, and with it the VM.
 *
 * These take the place of the checked ones. What is opened here exists: O_CREAT means
 * nothing for it, and no guest is to make files by an open without a mode. So with the
 * bit that makes O_TMPFILE of O_DIRECTORY, for which the same check ends the program.
 */
#define _GNU_SOURCE
#include <fcntl.h>

#define HARMLESS(flags) ((flags) & ~(O_CREAT | (O_TMPFILE & ~O_DIRECTORY)))

int __open_2(const char *path, int flags) { return open(path, HARMLESS(flags)); }
int __open64_2(const char *path, int flags) { return open64(path, HARMLESS(flags)); }
int __openat_2(int dir, const char *path, int flags) { return openat(dir, path, HARMLESS(flags)); }
int __openat64_2(int dir, const char *path, int flags) { return openat64(dir, path, HARMLESS(flags)); }
