/*
 * Records what a server does to the files of its job store (LD_PRELOAD), with all bytes and in order.
 *
 * RECORDER_STORE is the path of the database, without symlinks. The database, its write-ahead log, its rollback
 * journal and their directory are recorded; the shared memory (-shm) is not, because SQLite makes it anew. Each record
 * is appended to RECORDER_LOG after its call has succeeded and before the call returns. So a sync is in the log before
 * anything that follows from it, such as an answer to a client.
 *
 * If the file RECORDER_KILL exists, the next process that is about to sync the write-ahead log removes it and kills
 * itself: its frames are written and not synced.
 *
 * There is no state but these paths, so forks, threads and closed descriptors need no care. tests/durable_jobs/disk.rs
 * reads the records.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { DATABASE, LOG, JOURNAL, DIRECTORY, OTHER };

struct head {
	uint8_t op;
	uint8_t file;
	uint16_t unused;
	uint32_t length;
	uint64_t offset;
};

/* The paths of the files; the first is empty if nothing is recorded. */
static char paths[OTHER][PATH_MAX];
static char record_path[PATH_MAX];
static char kill_path[PATH_MAX];

__attribute__((constructor)) static void start(void)
{
	const char *store = getenv("RECORDER_STORE");
	const char *records = getenv("RECORDER_LOG");
	const char *killed = getenv("RECORDER_KILL");
	char *slash;

	if (store == NULL || records == NULL || killed == NULL)
		return;
	snprintf(record_path, PATH_MAX, "%s", records);
	snprintf(kill_path, PATH_MAX, "%s", killed);
	snprintf(paths[DATABASE], PATH_MAX, "%s", store);
	snprintf(paths[LOG], PATH_MAX, "%s-wal", store);
	snprintf(paths[JOURNAL], PATH_MAX, "%s-journal", store);
	snprintf(paths[DIRECTORY], PATH_MAX, "%s", store);
	slash = strrchr(paths[DIRECTORY], '/');
	if (slash != NULL)
		*slash = '\0';
}

static int file_of_path(const char *path)
{
	int file = DATABASE;

	if (paths[DATABASE][0] == '\0')
		return OTHER;
	while (file < OTHER && strcmp(path, paths[file]) != 0)
		file++;
	return file;
}

/* A file that was removed has another path here, and is not recorded: it has no name after a power loss. */
static int file_of(int fd)
{
	char link[64], path[PATH_MAX];
	long length;
	int before = errno;

	if (paths[DATABASE][0] == '\0')
		return OTHER;
	snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
	length = syscall(SYS_readlinkat, AT_FDCWD, link, path, sizeof path - 1);
	errno = before;
	if (length < 0)
		return OTHER;
	path[length] = '\0';
	return file_of_path(path);
}

/* One write(2) with O_APPEND, so records of several processes do not mix. */
static void record(char op, int file, uint64_t offset, const void *bytes, size_t length)
{
	struct head head = {(uint8_t)op, (uint8_t)file, 0, (uint32_t)length, offset};
	struct iovec parts[2] = {{&head, sizeof head}, {(void *)bytes, length}};
	int before = errno;
	long fd = syscall(SYS_openat, AT_FDCWD, record_path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
	long written = syscall(SYS_writev, fd, parts, 2);

	if (written != (long)(sizeof head + length))
		abort(); /* The test would check another history. */
	syscall(SYS_close, fd);
	errno = before;
}

static int opened(int directory, const char *path, int flags, mode_t mode)
{
	int fd = (int)syscall(SYS_openat, directory, path, flags, mode);
	int file;

	if (fd < 0 || (flags & (O_CREAT | O_TRUNC)) == 0)
		return fd;
	file = file_of(fd);
	if (file != OTHER && (flags & O_CREAT) != 0)
		record('C', file, 0, NULL, 0);
	if (file != OTHER && (flags & O_TRUNC) != 0)
		record('T', file, 0, NULL, 0);
	return fd;
}

static mode_t mode_of(int flags, va_list list)
{
	return (flags & (O_CREAT | __O_TMPFILE)) != 0 ? va_arg(list, mode_t) : 0;
}

/* `at` is the directory of a relative path. The last arguments are the parameters before the flags. */
#define OPEN(name, at, ...)                          \
	int name(__VA_ARGS__, int flags, ...)        \
	{                                            \
		va_list list;                        \
		mode_t mode;                         \
		va_start(list, flags);               \
		mode = mode_of(flags, list);         \
		va_end(list);                        \
		return opened(at, path, flags, mode); \
	}
OPEN(open, AT_FDCWD, const char *path)
OPEN(open64, AT_FDCWD, const char *path)
OPEN(openat, directory, int directory, const char *path)
OPEN(openat64, directory, int directory, const char *path)

/* Only an append or a position needs this: the offset before the call. */
ssize_t write(int fd, const void *bytes, size_t length)
{
	int file = file_of(fd);
	off_t offset = file < DIRECTORY ? lseek(fd, 0, SEEK_CUR) : 0;
	ssize_t written = syscall(SYS_write, fd, bytes, length);

	if (file < DIRECTORY && written > 0)
		record('W', file, (uint64_t)offset, bytes, (size_t)written);
	return written;
}

static ssize_t written_at(int fd, const void *bytes, size_t length, off_t offset)
{
	int file = file_of(fd);
	ssize_t written = syscall(SYS_pwrite64, fd, bytes, length, offset);

	if (file < DIRECTORY && written > 0)
		record('W', file, (uint64_t)offset, bytes, (size_t)written);
	return written;
}

ssize_t pwrite(int fd, const void *bytes, size_t length, off_t offset)
{
	return written_at(fd, bytes, length, offset);
}

ssize_t pwrite64(int fd, const void *bytes, size_t length, off64_t offset)
{
	return written_at(fd, bytes, length, offset);
}

static int cut(int fd, off_t length)
{
	int file = file_of(fd);
	int result = (int)syscall(SYS_ftruncate, fd, length);

	if (file < DIRECTORY && result == 0)
		record('T', file, (uint64_t)length, NULL, 0);
	return result;
}

int ftruncate(int fd, off_t length)
{
	return cut(fd, length);
}

int ftruncate64(int fd, off64_t length)
{
	return cut(fd, length);
}

static int cut_path(const char *path, off_t length)
{
	int file = file_of_path(path);
	int result = (int)syscall(SYS_truncate, path, length);

	if (file < DIRECTORY && result == 0)
		record('T', file, (uint64_t)length, NULL, 0);
	return result;
}

int truncate(const char *path, off_t length)
{
	return cut_path(path, length);
}

int truncate64(const char *path, off64_t length)
{
	return cut_path(path, length);
}

static int synced(int fd, long call)
{
	int file = file_of(fd);
	int result;

	if (file == LOG && syscall(SYS_unlinkat, AT_FDCWD, kill_path, 0) == 0)
		kill(getpid(), SIGKILL);
	result = (int)syscall(call, fd);
	if (file != OTHER && result == 0)
		record('S', file, 0, NULL, 0);
	return result;
}

int fsync(int fd)
{
	return synced(fd, SYS_fsync);
}

int fdatasync(int fd)
{
	return synced(fd, SYS_fdatasync);
}

int unlinkat(int directory, const char *path, int flags)
{
	int file = file_of_path(path);
	int result = (int)syscall(SYS_unlinkat, directory, path, flags);

	if (file < DIRECTORY && result == 0)
		record('U', file, 0, NULL, 0);
	return result;
}

int unlink(const char *path)
{
	return unlinkat(AT_FDCWD, path, 0);
}

/* No name of a store is renamed. If that changes, tests/durable_jobs/disk.rs says so. */
int rename(const char *from, const char *to)
{
	int file = file_of_path(from) != OTHER ? file_of_path(from) : file_of_path(to);
	int result = (int)syscall(SYS_renameat, AT_FDCWD, from, AT_FDCWD, to);

	if (file != OTHER && result == 0)
		record('R', file, 0, NULL, 0);
	return result;
}
