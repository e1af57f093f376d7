"""What stands between many gateways and many aggregation workers: a log of receipts, in memory or in Kafka.

    clients ══▶ gateway ──receipt──▶ topic, by client ──▶ worker ──sum, offsets, who: one transaction──▶ database
                   ╰────────────── bytes, fetched by claim check ──────╯                                    │
                                                                            coordinator ◀── merges the sums ╯

A receipt (``receipts.py``) is at most 4 KB: whose update, of which round, how large, which digest, and where its bytes
are. The bytes themselves never pass the broker. Workers of one group share the partitions; each merges what it reads
into a partial sum per round, and writes sum, offsets and who is in it in one transaction (``partials.py``): what is
delivered twice counts once, whoever dies when. The coordinator merges the partial sums as it would merge updates.

Not here: HTTP (``net/gateway.py``), what a sum is (``net/learning.py``).
"""
