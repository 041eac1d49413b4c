// A pool program in JavaScript. Calls are frames on descriptor 3, one at a time. If the pool has
// `concurrency` above 1, several calls come at once, each with an id, which its answer returns.
//
// A frame is a 4-byte little-endian length, then JSON. A frame can arrive in pieces. The last piece can
// contain the start of the next frame.

const net = require("net");

const methods = {
  "js.upper": async (params) => String(params).toUpperCase(),
  "js.nap": (seconds) => new Promise((done) => setTimeout(done, seconds * 1000, seconds)),
  "js.sum": async (params) => params.reduce((sum, value) => sum + value, 0),
};

async function* bodies(stream) {
  let pieces = [];
  let length = 0;
  let wanted = 4;
  for await (const piece of stream) {
    pieces.push(piece);
    length += piece.length;
    while (length >= wanted) {
      const data = Buffer.concat(pieces);
      const size = 4 + data.readUInt32LE(0);
      if (length >= size) yield data.subarray(4, size);
      pieces = [length >= size ? data.subarray(size) : data];
      wanted = length >= size ? 4 : size;
      length = pieces[0].length;
    }
  }
}

async function answer({ in: name, params }) {
  try {
    if (!Object.hasOwn(methods, name)) throw new Error(`no method ${name} here`);
    const result = await methods[name](params);
    return { out: name, result: result === undefined ? null : result };
  } catch (error) {
    return { out: "error", result: { code: 1, message: String(error.message) } };
  }
}

function send(stream, value) {
  const body = Buffer.from(JSON.stringify(value));
  const header = Buffer.alloc(4);
  header.writeUInt32LE(body.length, 0);
  stream.write(Buffer.concat([header, body]));
}

async function serve() {
  const calls = new net.Socket({ fd: 3, readable: true, writable: true });
  send(calls, { out: "ready" }); // needed for `ready = "message"`, harmless otherwise
  for await (const body of bodies(calls)) {
    const call = JSON.parse(body.toString());
    if (call.id !== undefined) {
      answer(call).then((value) => send(calls, { ...value, id: call.id }));
    } else if (call.in !== "rpc.cancel") {
      // A cancelled call is answered when it is done, like any other.
      send(calls, await answer(call));
    }
  }
  process.exit(0);
}

serve();
