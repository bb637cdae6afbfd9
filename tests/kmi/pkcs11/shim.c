/*
 * A PKCS#11 module that forwards to another one and misbehaves when told.
 *
 *   SHIM_MODULE        the module behind it
 *   SHIM_INIT_PARAMS   LibraryParameters for its C_Initialize, which NSS's softoken needs
 *   SHIM_VENDOR        a vendor's numbers for SM4 are taken, and stand for AES-128: no module with
 *                      SM4 can be had here, so this is a stand-in that walks the same path
 *   SHIM_MAKE_IV       C_EncryptInit under AES-GCM makes the IV, as the HSMs of FIPS 140-3 do
 *   SHIM_APPEND_IV     C_Encrypt appends 12 bytes to what is longer than the text of the probe key
 *   SHIM_COUNT_LOGINS  a file that grows by a byte with each C_Login
 *   SHIM_REFUSE_TOKEN  while this file exists no token is present
 *   SHIM_FAIL_DECRYPT  a file with a code, in hexadecimal: the next C_Decrypt of more than 32 bytes,
 *                      which is none of the probe key, takes the file away and returns the code
 *   SHIM_STRICT        read-only sessions are refused, as by AWS CloudHSM's client 5, and so are new
 *                      keys that do anything but encrypt and decrypt
 *
 * Data of C_Encrypt or C_Decrypt that contains SHIM-ABORT, SHIM-HANG, or SHIM-RV:<hex>; makes that
 * call abort, sleep, or return this code.
 */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <unistd.h>

typedef unsigned long ulong_t;
typedef ulong_t rv_t;

enum {
	C_INITIALIZE = 0,
	C_GET_FUNCTION_LIST = 3,
	C_GET_SLOT_LIST = 4,
	C_OPEN_SESSION = 12,
	C_LOGIN = 18,
	C_GET_ATTRIBUTE_VALUE = 24,
	C_FIND_OBJECTS_INIT = 26,
	C_ENCRYPT_INIT = 29,
	C_ENCRYPT = 30,
	C_DECRYPT_INIT = 33,
	C_DECRYPT = 34,
	C_GENERATE_KEY = 58,
	FUNCTIONS = 68,
};

#define CKR_OK 0x00UL
#define CKR_GENERAL_ERROR 0x05UL
#define CKR_FUNCTION_FAILED 0x06UL
#define CKR_TEMPLATE_INCONSISTENT 0xD1UL
#define CKR_TOKEN_NOT_PRESENT 0xE0UL
#define CKA_KEY_TYPE 0x100UL
#define CKA_VALUE_LEN 0x161UL
#define CKA_WRAP 0x106UL
#define CKA_DERIVE 0x10CUL
#define CKF_RW_SESSION 0x02UL
#define CKK_AES 0x1FUL
#define CKM_AES_KEY_GEN 0x1080UL
#define CKM_AES_GCM 0x1087UL
#define CKF_OS_LOCKING_OK 0x02UL

#define VENDOR_KEY_TYPE 0x80000101UL
#define VENDOR_KEY_GEN 0x80000104UL
#define VENDOR_GCM 0x80000105UL
#define VENDOR_KEY_SIZE 16UL

#define MAX_TEMPLATE 32

typedef struct {
	unsigned char version[2];
	void *call[FUNCTIONS];
} function_list_t;

typedef struct {
	ulong_t type;
	void *value;
	ulong_t length;
} attribute_t;

typedef struct {
	ulong_t mechanism;
	void *parameter;
	ulong_t length;
} mechanism_t;

typedef struct {
	unsigned char *iv;
	ulong_t iv_length;
	ulong_t iv_bits;
	unsigned char *aad;
	ulong_t aad_length;
	ulong_t tag_bits;
} gcm_t;

typedef struct {
	void *mutex_functions[4];
	ulong_t flags;
	const char *library_parameters;
	void *reserved;
} initialize_args_t;

static function_list_t *real;
static function_list_t ours;

static rv_t shim_initialize(void *args)
{
	rv_t (*call)(void *) = real->call[C_INITIALIZE];
	const char *parameters = getenv("SHIM_INIT_PARAMS");
	initialize_args_t own = {.flags = CKF_OS_LOCKING_OK, .library_parameters = parameters};

	return call(parameters ? &own : args);
}

static int token_is_away(void)
{
	const char *file = getenv("SHIM_REFUSE_TOKEN");

	return file && access(file, F_OK) == 0;
}

static rv_t shim_get_slot_list(unsigned char present, ulong_t *slots, ulong_t *count)
{
	rv_t (*call)(unsigned char, ulong_t *, ulong_t *) = real->call[C_GET_SLOT_LIST];

	if (token_is_away()) {
		*count = 0;
		return CKR_OK;
	}
	return call(present, slots, count);
}

static rv_t shim_open_session(ulong_t slot, ulong_t flags, void *app, void *notify, ulong_t *handle)
{
	rv_t (*call)(ulong_t, ulong_t, void *, void *, ulong_t *) = real->call[C_OPEN_SESSION];

	if (token_is_away())
		return CKR_TOKEN_NOT_PRESENT;
	if (getenv("SHIM_STRICT") && !(flags & CKF_RW_SESSION))
		return CKR_FUNCTION_FAILED;
	return call(slot, flags, app, notify, handle);
}

static rv_t shim_login(ulong_t session, ulong_t user, unsigned char *pin, ulong_t length)
{
	rv_t (*call)(ulong_t, ulong_t, unsigned char *, ulong_t) = real->call[C_LOGIN];
	const char *file = getenv("SHIM_COUNT_LOGINS");

	if (file) {
		int fd = open(file, O_WRONLY | O_CREAT | O_APPEND, 0600);

		if (fd < 0 || write(fd, "x", 1) != 1)
			abort();
		close(fd);
	}
	return call(session, user, pin, length);
}

/* ---- the vendor's numbers ---------------------------------------------------------------- */

static ulong_t standard_mechanism(ulong_t mechanism)
{
	if (getenv("SHIM_VENDOR")) {
		if (mechanism == VENDOR_GCM)
			return CKM_AES_GCM;
		if (mechanism == VENDOR_KEY_GEN)
			return CKM_AES_KEY_GEN;
	}
	return mechanism;
}

static void standard_template(attribute_t *to, const attribute_t *from, ulong_t count)
{
	static ulong_t aes = CKK_AES;

	if (count > MAX_TEMPLATE)
		abort();
	for (ulong_t i = 0; i < count; i++) {
		to[i] = from[i];
		if (getenv("SHIM_VENDOR") && to[i].type == CKA_KEY_TYPE &&
		    *(ulong_t *)to[i].value == VENDOR_KEY_TYPE)
			to[i].value = &aes;
	}
}

/* CKA_WRAP to CKA_DERIVE are what a key may do, but for CKA_ENCRYPT and CKA_DECRYPT before them. */
static int does_more_than_crypt(const attribute_t *template, ulong_t count)
{
	for (ulong_t i = 0; i < count; i++)
		if (template[i].type >= CKA_WRAP && template[i].type <= CKA_DERIVE &&
		    *(unsigned char *)template[i].value)
			return 1;
	return 0;
}

static rv_t shim_generate_key(ulong_t session, mechanism_t *mechanism, attribute_t *template,
			      ulong_t count, ulong_t *handle)
{
	rv_t (*call)(ulong_t, mechanism_t *, attribute_t *, ulong_t, ulong_t *) =
		real->call[C_GENERATE_KEY];
	mechanism_t standard = *mechanism;
	attribute_t changed[MAX_TEMPLATE];

	if (getenv("SHIM_STRICT") && does_more_than_crypt(template, count))
		return CKR_TEMPLATE_INCONSISTENT;
	standard.mechanism = standard_mechanism(mechanism->mechanism);
	standard_template(changed, template, count);
	return call(session, &standard, changed, count, handle);
}

static rv_t shim_find_objects_init(ulong_t session, attribute_t *template, ulong_t count)
{
	rv_t (*call)(ulong_t, attribute_t *, ulong_t) = real->call[C_FIND_OBJECTS_INIT];
	attribute_t changed[MAX_TEMPLATE];

	standard_template(changed, template, count);
	return call(session, changed, count);
}

static rv_t shim_get_attribute_value(ulong_t session, ulong_t object, attribute_t *template,
				     ulong_t count)
{
	rv_t (*call)(ulong_t, ulong_t, attribute_t *, ulong_t) = real->call[C_GET_ATTRIBUTE_VALUE];
	rv_t rv = call(session, object, template, count);

	if (!getenv("SHIM_VENDOR"))
		return rv;
	for (ulong_t i = 0; i < count; i++) {
		ulong_t size = 0;
		attribute_t length = {CKA_VALUE_LEN, &size, sizeof(size)};

		if (template[i].type == CKA_KEY_TYPE && template[i].value &&
		    template[i].length == sizeof(ulong_t) &&
		    *(ulong_t *)template[i].value == CKK_AES &&
		    call(session, object, &length, 1) == CKR_OK && size == VENDOR_KEY_SIZE)
			*(ulong_t *)template[i].value = VENDOR_KEY_TYPE;
	}
	return rv;
}

/* ---- operations -------------------------------------------------------------------------- */

static rv_t shim_encrypt_init(ulong_t session, mechanism_t *mechanism, ulong_t key)
{
	rv_t (*call)(ulong_t, mechanism_t *, ulong_t) = real->call[C_ENCRYPT_INIT];
	mechanism_t standard = *mechanism;

	standard.mechanism = standard_mechanism(mechanism->mechanism);
	if (standard.mechanism == CKM_AES_GCM && getenv("SHIM_MAKE_IV")) {
		gcm_t *gcm = mechanism->parameter;

		if (getrandom(gcm->iv, gcm->iv_length, 0) != (ssize_t)gcm->iv_length)
			abort();
	}
	return call(session, &standard, key);
}

static rv_t shim_decrypt_init(ulong_t session, mechanism_t *mechanism, ulong_t key)
{
	rv_t (*call)(ulong_t, mechanism_t *, ulong_t) = real->call[C_DECRYPT_INIT];
	mechanism_t standard = *mechanism;

	standard.mechanism = standard_mechanism(mechanism->mechanism);
	return call(session, &standard, key);
}

static rv_t obey(const unsigned char *data, ulong_t length)
{
	const char *order;

	if (memmem(data, length, "SHIM-ABORT", 10))
		abort();
	while (memmem(data, length, "SHIM-HANG", 9))
		sleep(3600);
	order = memmem(data, length, "SHIM-RV:", 8);
	return order && memchr(order, ';', length - ((unsigned char *)order - data))
		       ? strtoul(order + 8, NULL, 16)
		       : CKR_OK;
}

typedef rv_t (*crypt_t)(ulong_t, unsigned char *, ulong_t, unsigned char *, ulong_t *);

/* An error ends the operation: here it ends by running, its result thrown away. */
static rv_t end_with(rv_t code, crypt_t call, ulong_t session, unsigned char *data, ulong_t length)
{
	ulong_t size = length + 64;
	unsigned char *scratch = malloc(size);

	if (!scratch)
		abort();
	call(session, data, length, scratch, &size);
	free(scratch);
	return code;
}

static rv_t run_or_refuse(crypt_t call, ulong_t session, unsigned char *data, ulong_t length,
		  unsigned char *to, ulong_t *to_length)
{
	rv_t ordered = obey(data, length);

	if (ordered)
		return end_with(ordered, call, session, data, length);
	return call(session, data, length, to, to_length);
}

static rv_t shim_encrypt(ulong_t session, unsigned char *data, ulong_t length, unsigned char *to,
			 ulong_t *to_length)
{
	ulong_t room = *to_length;
	rv_t rv = run_or_refuse(real->call[C_ENCRYPT], session, data, length, to, to_length);

	if (rv == CKR_OK && length > 5 && getenv("SHIM_APPEND_IV")) {
		if (*to_length + 12 > room)
			abort();
		memset(to + *to_length, 0x1f, 12);
		*to_length += 12;
	}
	return rv;
}

/* The code that this decrypt is to fail with, once; CKR_OK for none. */
static rv_t planted_failure(ulong_t length)
{
	const char *name = getenv("SHIM_FAIL_DECRYPT");
	FILE *file = name && length > 32 ? fopen(name, "r") : NULL;
	rv_t code = CKR_OK;

	if (file) {
		if (fscanf(file, "%lx", &code) != 1)
			abort();
		fclose(file);
		unlink(name);
	}
	return code;
}

static rv_t shim_decrypt(ulong_t session, unsigned char *data, ulong_t length, unsigned char *to,
			 ulong_t *to_length)
{
	rv_t planted = planted_failure(length);

	if (planted)
		return end_with(planted, real->call[C_DECRYPT], session, data, length);
	return run_or_refuse(real->call[C_DECRYPT], session, data, length, to, to_length);
}

/* ---- the module -------------------------------------------------------------------------- */

rv_t C_GetFunctionList(function_list_t **list)
{
	const char *module = getenv("SHIM_MODULE");
	void *library = module ? dlopen(module, RTLD_NOW | RTLD_LOCAL) : NULL;
	rv_t (*get)(function_list_t **) = library ? dlsym(library, "C_GetFunctionList") : NULL;

	if (!get || get(&real) != CKR_OK)
		return CKR_GENERAL_ERROR;
	ours = *real;
	ours.version[0] = 2;
	ours.version[1] = 40;
	ours.call[C_INITIALIZE] = shim_initialize;
	ours.call[C_GET_FUNCTION_LIST] = C_GetFunctionList;
	ours.call[C_GET_SLOT_LIST] = shim_get_slot_list;
	ours.call[C_OPEN_SESSION] = shim_open_session;
	ours.call[C_LOGIN] = shim_login;
	ours.call[C_GET_ATTRIBUTE_VALUE] = shim_get_attribute_value;
	ours.call[C_FIND_OBJECTS_INIT] = shim_find_objects_init;
	ours.call[C_ENCRYPT_INIT] = shim_encrypt_init;
	ours.call[C_ENCRYPT] = shim_encrypt;
	ours.call[C_DECRYPT_INIT] = shim_decrypt_init;
	ours.call[C_DECRYPT] = shim_decrypt;
	ours.call[C_GENERATE_KEY] = shim_generate_key;
	*list = &ours;
	return CKR_OK;
}
