"""Modules that are loaded when they are asked for, so that an adapter may exceed memory.

What a file says of every module (shapes, types, blocks, scale) is known at once and costs no
memory: it is a `BlockFactors` on the meta device. Everything that only looks, plans or counts uses
those facts; loading, mapping and writing take one module after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from bdlora_megatron.blocks import BlockFactors, all_finite
from bdlora_megatron.convert.adapter.neutral import Adapter, ModuleKey
from bdlora_megatron.convert.adapter.problems import Problems
from bdlora_megatron.errors import AdapterFormatError, ShapeError

__all__ = ["LazyModules", "in_memory", "map_modules", "module_facts"]


class LazyModules(Mapping[ModuleKey, BlockFactors]):
    """A mapping that loads a module each time it is looked up, and keeps none.

    Attributes:
        facts: Every module without its numbers (factors on the meta device), in order.
    """

    def __init__(
        self,
        facts: Mapping[ModuleKey, BlockFactors],
        load: Callable[[ModuleKey], BlockFactors],
        *,
        subject: str,
        trusted: bool = False,
    ) -> None:
        """Make the mapping.

        Args:
            facts: Every module on the meta device, in the order to iterate in.
            load: Gives a module of `facts` with its numbers.
            subject: What fails where a module is broken; the start of the message.
            trusted: `load` gives finite numbers only, having them from a mapping like this one.
        """
        self.facts = facts
        self._load = load
        self._subject = subject
        self._trusted = trusted

    def __getitem__(self, key: ModuleKey) -> BlockFactors:
        if key not in self.facts:
            raise KeyError(key)
        problems = Problems()
        factors = self._checked(key, problems)
        problems.raise_if_any(self._subject)
        assert factors is not None
        return factors

    def __iter__(self) -> Iterator[ModuleKey]:
        return iter(self.facts)

    def __len__(self) -> int:
        return len(self.facts)

    def __contains__(self, key: object) -> bool:
        # Mapping's own would load the module to see whether it is there.
        return key in self.facts

    def load_all(self) -> dict[ModuleKey, BlockFactors]:
        """Load every module.

        Returns:
            All of them, in order.

        Raises:
            AdapterFormatError: If some are broken. All of them are listed.
        """
        problems = Problems()
        loaded = {key: self._checked(key, problems) for key in self.facts}
        problems.raise_if_any(self._subject)
        return {key: factors for key, factors in loaded.items() if factors is not None}

    def _checked(self, key: ModuleKey, problems: Problems) -> BlockFactors | None:
        try:
            factors = self._load(key)
        except (AdapterFormatError, ShapeError) as error:
            problems.add_error(error, str(key))
            return None
        if not (self._trusted or all_finite(factors.A, factors.B)):
            problems.add(
                "factors hold NaN or infinity; use a checkpoint from before training diverged",
                str(key),
            )
        return factors


def module_facts(adapter: Adapter) -> Mapping[ModuleKey, BlockFactors]:
    """Shapes, types, blocks and scales of all modules, without loading any.

    Args:
        adapter: Lazy or in memory.

    Returns:
        Every module with its factors on the meta device.
    """
    if isinstance(adapter.modules, LazyModules):
        return adapter.modules.facts
    return {
        key: replace(factors, A=factors.A.to("meta"), B=factors.B.to("meta"))
        for key, factors in adapter.modules.items()
    }


def map_modules(
    adapter: Adapter, change: Callable[[ModuleKey, BlockFactors], BlockFactors], *, subject: str
) -> Adapter:
    """The adapter with every module changed when it is looked up.

    Args:
        adapter: Lazy or in memory.
        change: Called with a module's key and factors: once for its facts (on the meta device, so
            it must not read numbers there), and at each look-up.
        subject: What fails where `change` refuses a module; the start of the message.

    Returns:
        A lazy adapter; it is usable as long as `adapter` is.

    Raises:
        AdapterFormatError: If `change` refuses the facts of some modules. All of them are listed.
    """
    problems, facts = Problems(), {}
    for key, factors in module_facts(adapter).items():
        try:
            facts[key] = change(key, factors)
        except (AdapterFormatError, ShapeError) as error:
            problems.add_error(error, str(key))
    problems.raise_if_any(subject)

    def load(key: ModuleKey) -> BlockFactors:
        return change(key, adapter.modules[key])

    return replace(adapter, modules=LazyModules(facts, load, subject=subject))


def in_memory(adapter: Adapter) -> Adapter:
    """The adapter with every module loaded.

    Args:
        adapter: Lazy or in memory.

    Returns:
        The same adapter where nothing is lazy; otherwise one that needs its files no longer.
    """
    if not isinstance(adapter.modules, LazyModules):
        return adapter
    return replace(adapter, modules=adapter.modules.load_all())
