"""Texts as characters, before tokenisation: torch-free, so that a page can preview them."""

from lowrank_core.documents.benchmark_texts import HUB_TEXTS, HubDataset, files_of_split
from lowrank_core.documents.local import FILE_CUTS, SPLITS, FileText, StdlibText, TextDocuments, documents_of

__all__ = ["FILE_CUTS", "HUB_TEXTS", "SPLITS", "FileText", "HubDataset", "StdlibText", "TextDocuments", "documents_of", "files_of_split"]
