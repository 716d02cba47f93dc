"""Proof: retrieval, similarity, clustering and classification, before and after."""
