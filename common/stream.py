"""Text from ids that arrive one by one."""
import codecs

from common.tokenizer import Tokenizer


class StreamDecoder:
    """push(id) returns the text that has become certain, never half a character; flush() returns the rest.
    Together they give decode(all ids), in linear time."""

    LONGEST = 8  # ids that may wait for the end of a character; UTF-8 needs at most 4

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.utf8 = tokenizer, codecs.getincrementaldecoder("utf-8")("replace")
        self.window, self.shown, self.prefix = [], 0, ""  # ids; the first `shown` gave the text `prefix`

    def push(self, i: int) -> str:
        data = self.tokenizer.token_bytes(int(i))
        if data is not None:
            return self.utf8.decode(data)
        self.window.append(int(i))
        text = self.tokenizer.decode(self.window)
        if text.endswith("\ufffd") and len(self.window) - self.shown < self.LONGEST:
            return ""
        new = text[len(self.prefix):]
        # an id's text may depend on the id before it (words get a space), so the ids just shown stay in view
        self.window = self.window[self.shown:]
        self.shown, self.prefix = len(self.window), self.tokenizer.decode(self.window)
        return new

    def flush(self) -> str:
        rest = self.utf8.decode(b"", final=True) + self.tokenizer.decode(self.window)[len(self.prefix):]
        self.window, self.shown, self.prefix = [], 0, ""
        return rest
