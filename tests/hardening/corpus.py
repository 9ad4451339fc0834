"""Hundreds of raw requests that are wrong in every way that we could think of; bytes, not only JSON."""

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tests.hardening.raw import post

_ROUTES: dict[str, dict[str, Any]] = {
    "/generated_texts/": {"seed_text": "x", "generation_max_len": 1},
    "/v1/completions": {"prompt": "x", "max_tokens": 1},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1},
    "/v1/embeddings": {"input": "x"},
}


@dataclass(frozen=True)
class HostileRequest:
    """One request, or a part of one."""

    name: str
    parts: tuple[bytes, ...]
    is_valid: bool = False
    """Odd, but it may be served."""


def corpus() -> list[HostileRequest]:
    """All of them, each with another name."""
    requests = [*_bodies(), *_fields(), *_heads(), *_framing()]
    assert len({one.name for one in requests}) == len(requests)
    return requests


def _bodies() -> Iterator[HostileRequest]:
    """Bodies that are no JSON object of the route, for every route."""
    deep = 20_000
    bodies: dict[str, bytes] = {
        "empty": b"",
        "white space": b" \n\t ",
        "half an object": b'{"seed_text": "x',
        "two objects": b"{}{}",
        "a list": b"[]",
        "a number": b"17",
        "null": b"null",
        "a text": b'"x"',
        "true": b"true",
        "NaN": b"NaN",
        "single quotes": b"{'prompt': 'x'}",
        "a comment": b'/* x */ {"prompt": "x"}',
        "a trailing comma": b'{"prompt": "x",}',
        "a byte order mark": b'\xef\xbb\xbf{"prompt": "x"}',
        "UTF-16": '{"prompt": "x"}'.encode("utf-16"),
        "no UTF-8": b'{"prompt": "\xff\xfe\xc0\xaf"}',
        "an overlong slash": b'{"prompt": "\xc0\xaf"}',
        "zero bytes": b"\x00" * 100,
        "a zero byte in a key": b'{"pro\\u0000mpt": "x"}',
        "deep lists": b"[" * deep,
        "deep closed lists": b"[" * deep + b"]" * deep,
        "deep objects": b'{"a":' * deep + b"1" + b"}" * deep,
        "a million digits": b'{"max_tokens": ' + b"9" * 1_000_000 + b"}",
        "a million keys": b"{" + b",".join(b'"k%d":1' % n for n in range(60_000)) + b"}",
        "one key twice": b'{"prompt": 1, "prompt": 2, "seed_text": 1, "input": 1, "messages": 1}',
        "a secret in an unknown field": b'{"' + b"S3cret" * 30 + b'": "S3cret"}',
        "markup in an unknown field": b'{"<script>alert(1)</script>": 1}',
        "gzip": gzip.compress(b'{"prompt": "x"}'),
        "a form": b"prompt=x&max_tokens=1",
        "multipart": b'--b\r\ncontent-disposition: form-data; name="x"\r\n\r\ny\r\n--b--\r\n',
        "XML": b'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><a>&b;</a>',
        "a pickle": b"\x80\x04\x95\x1a"
        + b"\x00" * 7
        + b"\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.",
        "two megabytes": b'{"prompt": "' + b"x" * 2_000_000 + b'"}',
        "a list of a million": b'{"prompt": [' + b"1," * 500_000 + b"1]}",
    }
    # Unknown fields are passed over, and a text to continue may be left out.
    unknown = (
        *("a secret in an unknown field", "markup in an unknown field", "a zero byte in a key"),
        "a million keys",
    )
    for route in _ROUTES:
        for name, body in bodies.items():
            is_valid = name in unknown and route in ("/generated_texts/", "/v1/completions")
            is_valid |= name == "a list of a million" and route == "/generated_texts/"
            yield HostileRequest(f"{route} {name}", (post(route, body),), is_valid)


def _fields() -> Iterator[HostileRequest]:
    """Bodies whose every field but one is good."""
    numbers = {
        "NaN": "NaN",
        "infinity": "Infinity",
        "minus infinity": "-Infinity",
        "1e999": "1e999",
        "minus one": "-1",
        "two to the 63": "9223372036854775808",
        "a text": '"1"',
        "true": "true",
        "a list": "[1]",
        "half": "0.5",
        "minus zero": "-0.0",
        "octal": "017",
        "hexadecimal": "0x10",
    }
    numeric = {
        "/generated_texts/": ("generation_max_len", "num_return_sequences", "seed", "top_k"),
        "/v1/completions": ("max_tokens", "n", "logprobs", "best_of"),
        "/v1/chat/completions": ("max_tokens", "top_logprobs", "n"),
    }
    for route, fields in numeric.items():
        for field in fields:
            for name, value in numbers.items():
                good = json.dumps({k: v for k, v in _ROUTES[route].items() if k != field})
                body = f'{good[:-1]}, "{field}": {value}}}'.encode()
                neutral = ("seed", "top_k", "max_tokens")
                is_valid = name == "minus one" and field in neutral
                is_valid |= name == "minus zero" and field == "top_logprobs"
                yield HostileRequest(f"{route} {field} {name}", (post(route, body),), is_valid)
    for field in ("temperature", "top_p", "repetition_penalty", "min_p", "presence_penalty"):
        for name in ("NaN", "infinity", "1e999", "a text", "a list", "true"):
            body = f'{{"prompt": "x", "max_tokens": 1, "{field}": {numbers[name]}}}'.encode()
            yield HostileRequest(f"completion {field} {name}", (post("/v1/completions", body),))
    texts: dict[str, str] = {
        "a lone high surrogate": '"\\ud800"',
        "a lone low surrogate": '"\\udc00"',
        "surrogates in the wrong order": '"\\udc00\\ud800"',
        "half an escape": '"\\u12"',
        "an unknown escape": '"\\x41"',
        "a raw line end": '"a\nb"',
        "300,000 characters": json.dumps("x" * 300_000),
        "an object": "{}",
        "null in a list": "[null]",
        "negative ids": "[-1]",
        "ids out of range": "[4294967296]",
        "ids and texts": '[1, "x"]',
        "an empty list": "[]",
        "lists of empty lists": "[[]]",
        "2,049 texts": json.dumps(["x"] * 2049),
    }
    for name, value in texts.items():
        body = f'{{"prompt": {value}, "max_tokens": 1}}'.encode()
        yield HostileRequest(f"prompt {name}", (post("/v1/completions", body),))
        body = f'{{"messages": [{{"role": "user", "content": {value}}}], "max_tokens": 1}}'.encode()
        is_valid = name == "an empty list"  # of parts
        yield HostileRequest(f"message {name}", (post("/v1/chat/completions", body),), is_valid)
        body = f'{{"input": {value}}}'.encode()
        yield HostileRequest(f"input {name}", (post("/v1/embeddings", body),))
    others: list[tuple[str, dict[str, object]]] = [
        ("an unknown model", {"model": "../../etc/passwd"}),
        ("a model of 10 KB", {"model": "m" * 10_000}),
        ("a suffix", {"suffix": "y"}),
        ("tokens beyond the context", {"max_tokens": 100_000}),
        ("zero tokens without echo", {"max_tokens": 0}),
        ("best_of below n", {"n": 3, "best_of": 2}),
        ("17 stops", {"stop": ["x"] * 17}),
        ("a stop of 1,000 characters", {"stop": "x" * 1000}),
        ("a bias of no token", {"logit_bias": {"x": 1}}),
        ("a bias out of range", {"logit_bias": {"999999999": 1}}),
        ("a bias too large", {"logit_bias": {"1": 101}}),
        ("2,000 biases", {"logit_bias": {str(n): 1 for n in range(2000)}}),
        ("stream options without a stream", {"stream_options": {"include_usage": True}}),
        ("best_of streamed", {"best_of": 4, "stream": True}),
        ("a format without a schema", {"response_format": {"type": "json_schema"}}),
        ("a format of no kind", {"response_format": {"type": "grammar"}}),
        ("a broken expression", _regex("([")),
        ("an expression that explodes", _regex("(a{1000}){1000}{1000}")),
        ("an impossible schema", _schema({"type": "nothing"})),
        ("a schema that refers to itself", _schema({"$ref": "#"})),
        ("a schema of another host", _schema({"$ref": "http://169.254.169.254/"})),
        ("a sampler of llama.cpp's", {"mirostat": 2}),
        ("a beam of vLLM's", {"use_beam_search": True}),
    ]  # fmt: skip
    for name, fields_ in others:
        body = json.dumps({**_ROUTES["/v1/completions"], **fields_}).encode()
        # llguidance follows this: not in a way that anybody wanted, but in bounded time.
        is_valid = name == "an expression that explodes"
        yield HostileRequest(f"completion with {name}", (post("/v1/completions", body),), is_valid)
    roles = ("tool", "", "System", "user\u0000", "x" * 300)
    for role in roles:
        body = json.dumps({"messages": [{"role": role, "content": "x"}]}).encode()
        yield HostileRequest(f"role {role[:8]!r}", (post("/v1/chat/completions", body),))
    for name, messages in {"none": [], "1,001": [{"role": "user", "content": "x"}] * 1001}.items():
        body = json.dumps({"messages": messages}).encode()
        yield HostileRequest(f"messages: {name}", (post("/v1/chat/completions", body),))


def _regex(expression: str) -> dict[str, object]:
    return {"response_format": {"type": "regex", "regex": expression}}


def _schema(schema: object) -> dict[str, object]:
    wrapped = {"name": "a", "schema": schema}
    return {"response_format": {"type": "json_schema", "json_schema": wrapped}}


def _heads() -> Iterator[HostileRequest]:
    """What stands before the body."""
    host = b"host: localhost\r\n"
    end = b"connection: close\r\n\r\n"
    line = b"GET /health HTTP/1.1\r\n"
    heads: dict[str, bytes] = {
        "garbage": bytes(range(256)) * 4,
        "TLS": bytes.fromhex("16030100c8010000c40303") + b"\x00" * 200,
        "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        "HTTP/0.9": b"GET /health\r\n\r\n",
        "HTTP/9.9": b"GET /health HTTP/9.9\r\n" + host + end,
        "SMTP": b"EHLO service\r\nMAIL FROM:<a@b>\r\n\r\n",
        "SSH": b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
        "RTSP": b"OPTIONS rtsp://x RTSP/1.0\r\n\r\n",
        "empty lines": b"\r\n" * 50,
        "no host": line + end,
        "two hosts": line + host + b"host: other\r\n" + end,
        "a host with a space": line + b"host: a b\r\n" + end,
        "a name with a space": line + host + b"a b: c\r\n" + end,
        "a space before the colon": line + host + b"a : c\r\n" + end,
        "no colon": line + host + b"abc\r\n" + end,
        "an empty name": line + host + b": c\r\n" + end,
        "a zero byte in a value": line + host + b"a: b\x00c\r\n" + end,
        "a bare carriage return": line + host + b"a: b\rc\r\n" + end,
        "a folded line": line + host + b"a: b\r\n c\r\n" + end,
        "a name that is no ASCII": line + host + "ä: b\r\n".encode() + end,
        "a header of 100 KB": line + host + b"a: " + b"b" * 100_000 + b"\r\n" + end,
        "10,000 headers": line + host + b"".join(b"a%d: b\r\n" % n for n in range(10_000)) + end,
        "a target of 100 KB": b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n" + host + end,
        "a target of no ASCII": "GET /ä HTTP/1.1\r\n".encode() + host + end,
        "a target with a zero byte": b"GET /\x00 HTTP/1.1\r\n" + host + end,
        "no target": b"GET  HTTP/1.1\r\n" + host + end,
        "spaces around": b" GET /health HTTP/1.1 \r\n" + host + end,
        "a tab": b"GET\t/health\tHTTP/1.1\r\n" + host + end,
        "lower case": b"get /health HTTP/1.1\r\n" + host + end,
        "a method of 1 KB": b"A" * 1000 + b" /health HTTP/1.1\r\n" + host + end,
        "a method with a slash": b"GE/T /health HTTP/1.1\r\n" + host + end,
        "half a request line": b"GET /hea",
        "half a head": line + host + b"a: ",
        "one letter": b"G",
    }
    for name, data in heads.items():
        yield HostileRequest(f"head: {name}", (data,), is_valid=True)
    targets = [
        *(
            "/..",
            "/../../etc/passwd",
            "/%2e%2e/%2e%2e/etc/passwd",
            "/health/../v1/models",
            "//health",
        ),
        *(
            "/health%00",
            "/health%2f",
            "/%",
            "/%zz",
            "/%ff%fe",
            "/\\health",
            "/health;a=b",
            "/*",
            "/~",
        ),
        *(
            "/.git/config",
            "/.env",
            "/docs/../metrics",
            "/openapi.json/",
            "/v1/models/../../x",
            "/v1/",
        ),
        *(
            "http://other/health",
            "/v1/models/" + "a" * 500,
            "/?" + "a=b&" * 500,
            "*",
            "/v1/models/%0d%0aa:b",
        ),
    ]
    for target in targets:
        data = f"GET {target} HTTP/1.1\r\n".encode() + host + end
        yield HostileRequest(f"target: {target[:40]}", (data,), is_valid=True)
    for method in ("PUT", "DELETE", "PATCH", "TRACE", "CONNECT", "OPTIONS", "HEAD", "PROPFIND"):
        data = f"{method} /v1/completions HTTP/1.1\r\n".encode() + host + end
        yield HostileRequest(f"method: {method}", (data,), is_valid=True)


def _framing() -> Iterator[HostileRequest]:
    """How long the body is said to be, and how long it is."""
    start = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n"
    body = b'{"prompt": "x", "max_tokens": 1}'
    chunked = start + b"transfer-encoding: chunked\r\nconnection: close\r\n\r\n"
    close = b"connection: close\r\n\r\n"
    known = start + b"content-length: %d\r\n" % len(body)
    cases: dict[str, tuple[bytes, ...]] = {
        "a negative length": (start + b"content-length: -1\r\n\r\n" + body,),
        "a length with a sign": (start + b"content-length: +32\r\n\r\n" + body,),
        "a length of letters": (start + b"content-length: abc\r\n\r\n" + body,),
        "an empty length": (start + b"content-length: \r\n\r\n" + body,),
        "a length of 30 digits": (start + b"content-length: " + b"9" * 30 + b"\r\n\r\n" + body,),
        "a length of 10 GB": (start + b"content-length: 10000000000\r\n\r\n" + body,),
        "two lengths": (start + b"content-length: 5\r\ncontent-length: 6\r\n\r\n" + body,),
        "a list of lengths": (start + b"content-length: 5, 6\r\n\r\n" + body,),
        "a length and chunks": (start + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",),
        "chunks twice": (start + b"transfer-encoding: chunked, chunked\r\n\r\n0\r\n\r\n",),
        "chunks of gzip": (start + b"transfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",),
        "identity": (start + b"transfer-encoding: identity\r\n\r\n" + body,),
        "chunks with a letter": (start + b"transfer-encoding: xchunked\r\n\r\n0\r\n\r\n",),
        "no length": (start + b"\r\n" + body,),
        "too short a body": (start + b"content-length: 1000\r\n\r\n" + body,),
        "too long a body": (start + b"connection: close\r\ncontent-length: 5\r\n\r\n" + body,),
        "a chunk size of letters": (chunked + b"xyz\r\n" + body + b"\r\n0\r\n\r\n",),
        "a negative chunk": (chunked + b"-5\r\n" + body + b"\r\n0\r\n\r\n",),
        "a chunk of 16 EB": (chunked + b"ffffffffffffffff\r\n" + body,),
        "a chunk that is longer": (chunked + b"5\r\n" + body + b"\r\n0\r\n\r\n",),
        "a chunk without an end": (chunked + b"20\r\n" + body,),
        "a chunk extension of 100 KB": (chunked + b"20;" + b"a" * 100_000 + b"\r\n" + body,),
        "a million small chunks": (chunked + b"1\r\nx\r\n" * 300_000 + b"0\r\n\r\n",),
        "a bad trailer": (chunked + b"20\r\n" + body + b"\r\n0\r\nbad trailer\r\n\r\n",),
        "a wrong chunk after the body began": (chunked + b"20\r\n" + body + b"\r\n", b"zz\r\n\r\n"),
        "a body after a pause": (known + b"connection: close\r\n\r\n", body),
        "a body letter by letter": (known + close, *(body[n : n + 1] for n in range(10))),
        "100 MB": (post("/v1/completions", b" " * 100_000_000),),
        "100 MB to no route": (post("/nothing", b" " * 100_000_000),),
        "10 MB in chunks": (chunked + b"a00000\r\n" + b" " * 0xA00000 + b"\r\n0\r\n\r\n",),
        "a body for GET": (b"GET /x HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1\r\n" + close + b"a",),
        "expect 100": (known + b"expect: 100-continue\r\nconnection: close\r\n\r\n", body),
        "expect something": (known + b"expect: tea\r\nconnection: close\r\n\r\n" + body,),
        "an upgrade to a web socket": (
            b"GET /health HTTP/1.1\r\nhost: localhost\r\nupgrade: websocket\r\nconnection: upgrade\r\n"
            b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nsec-websocket-version: 13\r\n\r\n",
        ),
        "an upgrade to HTTP/2": (
            b"GET /health HTTP/1.1\r\nhost: localhost\r\nupgrade: h2c\r\nconnection: upgrade\r\n\r\n",
        ),
        "two requests at once": (known + b"\r\n" + body + known + b"connection: close\r\n\r\n" + body,),
        "a smuggled request": (
            start + b"content-length: 4\r\ntransfer-encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n"
            b"GET /metrics HTTP/1.1\r\nhost: localhost\r\n\r\n",
        ),
        "a request from a page": (known + b"origin: https://evil.example\r\n" + close + body,),
        "a request from null": (known + b"origin: null\r\nconnection: close\r\n\r\n" + body,),
        "a forwarded address": (known + b"x-forwarded-for: 1.2.3.4\r\nconnection: close\r\n\r\n" + body,),
        "an id with a line end": (known + b"x-request-id: a%0d%0ab: c\r\nconnection: close\r\n\r\n" + body,),
    }  # fmt: skip
    for name, parts in cases.items():
        yield HostileRequest(f"framing: {name}", parts, is_valid=True)
