"""A client that streams through faults and counts the ends; also as a program that can be stopped."""

import json
import sys
import threading

import nos
from nos.errors import NosError

from tests.servers import wait_for

#: What each frame asks `fake/slow` to sleep, and what it answers.
FRAME_S = 0.005
#: The server's window.
WINDOW = 16


class Sender:
    """One stream for the whole fault, a thread that sends, and one that counts the ends."""

    def __init__(self, client, model):
        self.stream = client.model(model).stream(max_pending=WINDOW)
        self.num_sent = self.num_results = 0
        #: By frame, in the order of arrival: None, or its error.
        self.ends = {}
        self.doubled = []
        self.wrong = []
        self.broken = None
        self.stopping = threading.Event()
        self.threads = [threading.Thread(target=run) for run in (self.send, self.receive)]
        for thread in self.threads:
            thread.start()

    def send(self):
        while not self.stopping.is_set():
            try:
                self.stream.send(FRAME_S)
            except NosError as error:
                self.broken = error
                break
            self.num_sent += 1
        self.stream.finish()

    def receive(self):
        for result in self.stream:
            if result.seq in self.ends:
                self.doubled.append(result.seq)
            self.ends[result.seq] = result.error
            if result.error is None:
                self.num_results += 1
                if result.value != FRAME_S:
                    self.wrong.append(result)

    def stop(self):
        self.stopping.set()
        for thread in self.threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in self.threads)
        self.stream.close()

    def check(self, num_faults):
        """Row A6 for this stream: every frame has one end, in order; return how many are errors."""
        assert self.broken is None
        assert self.doubled == []
        assert self.wrong == []
        assert list(self.ends) == list(range(1, self.num_sent + 1))
        errors = [error for error in self.ends.values() if error is not None]
        assert all(isinstance(it, NosError) and it.retryable for it in errors), errors
        assert len(errors) <= num_faults * WINDOW
        assert self.num_results + len(errors) == self.num_sent
        return len(errors)


def flows(senders, patience_s=60.0):
    """Wait until each stream has brought a few results more."""
    before = [sender.num_results for sender in senders]
    wait_for(
        lambda: all(
            sender.num_results > num + 3 for sender, num in zip(senders, before, strict=True)
        ),
        "every stream flows",
        patience_s,
    )


def main():
    """Stream until a line comes on standard input; then say what was lost."""
    address, token_file, via, model = sys.argv[1:]
    with nos.connect(address, token_file=token_file, via=via) as client:
        sender = Sender(client, model)
        for line in sys.stdin:
            if line == "results\n":
                print(sender.num_results, flush=True)
            else:
                break
        sender.stop()
        print(json.dumps({"lost": sender.check(num_faults=1), "sent": sender.num_sent}))


if __name__ == "__main__":
    main()
