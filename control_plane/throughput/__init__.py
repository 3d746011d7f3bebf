"""Throughput: what was owed and delivered, by pledge and minute."""
