#!/bin/bash
# A pool program in bash. Calls are frames on descriptor 3, one at a time. It needs jq.
#
# A frame is a 4-byte little-endian length, then JSON. The shell can hold only numbers and text without
# NUL, so jq handles the JSON.
export LC_ALL=C # lengths are bytes

exec <&3 >&3

send() {
	local n=${#1} byte length
	for byte in $((n & 255)) $((n >> 8 & 255)) $((n >> 16 & 255)) $((n >> 24 & 255)); do
		printf -v byte '\\x%02x' "$byte"
		length+=$byte
	done
	printf "$length%s" "$1"
}

# Reads the length of the next frame into size. Fails at the end of the calls.
length() {
	local b
	read -r -a b < <(head -c 4 | od -A n -t u1)
	[ ${#b[@]} = 4 ] && size=$((b[0] | b[1] << 8 | b[2] << 16 | b[3] << 24))
}

while length; do
	call=$(head -c "$size")
	case $(jq -r .in <<<"$call") in
	sh.words) answer=$(jq -c '{out: .in, result: (.params | split(" ") | length)}' <<<"$call") ;;
	*) answer='{"out": "error", "result": {"code": 1, "message": "no such method"}}' ;;
	esac
	send "$answer"
done
