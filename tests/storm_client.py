"""A client in another language: Python's standard library against report/message-format.md, and nothing of this repository.

It knows nothing of servers that die: each connection is opened once, every answer must be the one that is due, and any error ends the
program with status 1. It says "connected" when all connections are there, and goes on until its standard input ends.

usage: storm_client.py HOST:PORT UNIX_PATH CONNECTIONS_OVER_EACH
"""

import os
import random
import socket
import sys
import threading
import time

WELCOME, VALUE, STORED, DELETED, MISSING, EXISTS, NUMBER = range(7)
PATIENCE_SECONDS = 30


def varint(number):
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def zigzag(number):
    return varint(number << 1 if number >= 0 else (-number << 1) - 1)


def text(content):
    return varint(len(content)) + content


class Reader:
    """Takes fields out of a message."""

    def __init__(self, message):
        self.message, self.at = message, 0

    def varint(self):
        number = shift = 0
        while True:
            byte = self.message[self.at]
            self.at += 1
            number |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return number

    def text(self):
        length = self.varint()
        self.at += length
        return bytes(self.message[self.at - length : self.at])

    def zigzag(self):
        number = self.varint()
        return number >> 1 if number & 1 == 0 else -((number + 1) >> 1)


class Client:
    """One connection, opened once."""

    def __init__(self, family, address, name):
        self.name = name
        self.random = random.Random(name)
        self.socket = socket.socket(family, socket.SOCK_STREAM)
        self.socket.settimeout(PATIENCE_SECONDS)
        self.socket.connect(address)
        if family == socket.AF_INET:
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.queued, self.asked, self.answered, self.input = [], 0, 0, bytearray()
        self.ask(0, varint(1) + text(name.encode()) + varint(os.getpid()))
        self.send()
        self.expect(WELCOME)

    def ask(self, variant, fields):
        self.asked += 1
        message = b"\x01" + varint(self.asked) + varint(variant) + fields
        self.queued.append(len(message).to_bytes(4, "little") + message)

    def get(self, key):
        self.ask(1, text(key))

    def set(self, key, value, if_absent=False):
        self.ask(2, varint(int(if_absent)) + text(key) + text(value))

    def delete(self, key):
        self.ask(3, text(key))

    def increment(self, key, by):
        self.ask(4, text(key) + zigzag(by))

    def send(self):
        self.socket.sendall(b"".join(self.queued))
        self.queued = []

    def fill(self, length):
        while len(self.input) < length:
            received = self.socket.recv(1 << 18)
            if not received:
                raise EOFError("the connection was closed")
            self.input += received

    def expect(self, variant, content=None):
        self.fill(4)
        length = int.from_bytes(self.input[:4], "little")
        self.fill(4 + length)
        message = bytes(self.input[4 : 4 + length])
        del self.input[: 4 + length]
        self.answered += 1
        reader = Reader(message)
        reader.at = 1
        number, found = reader.varint(), reader.varint()
        if (message[0], number, found) != (1, self.answered, variant):
            raise ValueError(f"answer {number} is {found}; due is {variant} for {self.answered}: {message[:80]}")
        given = reader.text() if found == VALUE else reader.zigzag() if found == NUMBER else None
        if given != content:
            raise ValueError(f"answer {number} has {str(given)[:80]}, not {str(content)[:80]}")

    def work(self, over):
        counter, counted, serial = f"{self.name} count".encode(), 0, 0
        while not over.is_set():
            due = []
            for _ in range(self.random.randint(1, 40)):
                by = self.random.randint(-300, 900)
                self.increment(counter, by)
                counted += by
                due.append((NUMBER, counted))
            key = f"{self.name} {serial}".encode()
            length = self.random.randint(100_000, 2_000_000) if serial % 50 == 49 else serial % 900
            value = self.random.randbytes(length)
            serial += 1
            self.set(key, value, if_absent=True)
            self.set(key, b"another", if_absent=True)
            self.get(key)
            self.delete(key)
            self.delete(key)
            self.get(key)
            due += [(STORED,), (EXISTS,), (VALUE, value), (DELETED,), (MISSING,), (MISSING,)]
            self.send()
            for answer in due:
                self.expect(*answer)
            time.sleep(self.random.random() / 500)
        self.get(counter)
        self.send()
        self.expect(VALUE, str(counted).encode()) if counted or serial else self.expect(MISSING)
        self.socket.shutdown(socket.SHUT_WR)
        if self.socket.recv(1) or self.input:
            raise ValueError("something came behind the last answer")


def main():
    tcp, unix, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
    host, port = tcp.rsplit(":", 1)
    clients = [Client(socket.AF_INET, (host, int(port)), f"python tcp {at}") for at in range(count)]
    clients += [Client(socket.AF_UNIX, unix, f"python unix {at}") for at in range(count)]
    over, faults = threading.Event(), []

    def work(client):
        try:
            client.work(over)
        except Exception as fault:
            faults.append(f"{client.name}: {type(fault).__name__}: {fault}")
            # Ends the program at once, so that whoever started it knows.
            print("\n".join(faults), file=sys.stderr, flush=True)
            os._exit(1)

    threads = [threading.Thread(target=work, args=[client]) for client in clients]
    for thread in threads:
        thread.start()
    print("connected", flush=True)
    sys.stdin.read()
    over.set()
    for thread in threads:
        thread.join()
    print(sum(client.answered for client in clients), "answers")


if __name__ == "__main__":
    main()
