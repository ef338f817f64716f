"""Keys and values of tokens that were read, for text generation."""

from torch import Tensor


class KeyValueCache:
    """One layer's keys and values of every token so far, and its projected position tables.

    Sequences end at the same place: of a shorter prompt the first places stay zeros.

    Args:
        batch: sequences.
        capacity: places of a sequence, memory for which is taken at once.
        prompt: places that the prompts take.
        tokens: of packed prompts, each token's sequence and place, int64 [T] both; None: prompts
            come as [B, prompt, hidden].

    Attributes:
        length: places in use, 0 before `fill`.
        tables: pos_key and pos_query, [2 * span, H, D], or None.
    """

    def __init__(
        self, batch: int, capacity: int, prompt: int, tokens: tuple[Tensor, Tensor] | None = None
    ):
        self.batch, self.capacity, self.prompt, self.tokens = batch, capacity, prompt, tokens
        self.length = 0
        self.tables: tuple[Tensor | None, Tensor | None] = (None, None)
        self._stored: tuple[Tensor, ...] = ()  # Keys and values, [B, capacity, H, D].

    def fill(
        self, key: Tensor, value: Tensor, pos_key: Tensor | None, pos_query: Tensor | None
    ) -> None:
        """Keeps the prompts' key and value, [B, prompt, H, D] or packed [T, H, D]."""
        heads, size = key.shape[-2:]
        # In memory a head's tokens lie together, as the product of one query with them reads them.
        self._stored = tuple(
            x.new_zeros(self.batch, heads, self.capacity, size).transpose(1, 2)
            for x in (key, value)
        )
        places = self.tokens or (slice(None), slice(self.prompt))
        for stored, x in zip(self._stored, (key, value), strict=True):
            stored[places] = x
        self.length = self.prompt
        self.tables = (pos_key, pos_query)

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The next token's key and value, [B, 1, H, D] -> those of all so far, [B, length, H, D].

        Raises:
            ValueError: more than one token, or more than `capacity` in all.
        """
        if key.size(1) != 1 or self.length == self.capacity:
            raise ValueError(
                f"cache takes one token at a time, {self.capacity} in all; got {key.size(1)} "
                f"after {self.length}"
            )
        self.length += 1
        for stored, x in zip(self._stored, (key, value), strict=True):
            stored[:, self.length - 1] = x[:, 0]
        key, value = (stored[:, : self.length] for stored in self._stored)
        return key, value
