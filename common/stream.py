"""Text from ids that arrive one by one."""
import codecs

from common.tokenizer import Tokenizer


class StreamDecoder:
    """Text as ids arrive: push(id) returns what has become certain, never half a character; flush() the rest.
    Together they give decode(all ids), in time linear in their number."""

    LONGEST = 8  # ids that may wait for the end of one character; UTF-8 needs at most 4

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.utf8 = tokenizer, codecs.getincrementaldecoder("utf-8")("replace")
        self.window, self.told, self.prefix = [], 0, ""  # ids; the text of the first `told` is out: `prefix`

    def push(self, i: int) -> str:
        data = self.tokenizer.token_bytes(int(i))
        if data is not None:
            return self.utf8.decode(data)
        self.window.append(int(i))
        text = self.tokenizer.decode(self.window)
        if text.endswith("\ufffd") and len(self.window) - self.told < self.LONGEST:
            return ""
        new = text[len(self.prefix):]
        # an id's text may depend on the one before (words get a space), so what was just told stays in view
        self.window = self.window[self.told:]
        self.told, self.prefix = len(self.window), self.tokenizer.decode(self.window)
        return new

    def flush(self) -> str:
        rest = self.utf8.decode(b"", final=True)
        if self.window:
            rest += self.tokenizer.decode(self.window)[len(self.prefix):]
        self.window, self.told, self.prefix = [], 0, ""
        return rest
