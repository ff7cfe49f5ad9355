"""What a parallel thought is: tags, the tree that a trace spells, the layout it trains under, packing.
Every other room speaks in these types, and none of them knows a model or an engine."""
