"""The faults that the scripts must survive, and where each is provoked.

Table by table, a fault and the tests that provoke it: file, function and, where it is one row of that test's own table,
the row. `pytest -m fault` runs them all; tests/test_faults.py holds this list against the tests that there are.
"""

import pytest

COLLECTED = pytest.StashKey[
    tuple[set[str], set[str]]
]()  # files that pytest collected whole, and the tests in all files

RESUME = "test_resume.py::test_a_run_goes_on"
BAD = "test_bad_input.py::test_a_fault_is_told_before_a_training"
CHECKPOINT, LAUNCH, ENGINE = "test_checkpoint.py::test_", "test_launch.py::test_", "test_engine.py::test_"
DATASET, ARCHITECTURE, DOWNLOAD = "test_dataset.py::test_", "test_architecture.py::test_", "test_download.py::test_"
SECURITY = "test_security.py::test_"

# What a machine without a GPU cannot provoke, and what stands for it.
ON_A_GPU = {
    "GPU or host memory exhausted": "torch.OutOfMemoryError is raised by the test; a host's memory is really exhausted",
    "one rank dies or raises": "the collectives are gloo's; NCCL's watchdog ends a rank that waits too long by itself",
    "non-finite loss on one rank": "fp16 needs a GPU: its scaler is given infinite gradients on the CPU",
}

FAULTS = {
    "Runs and checkpoints": {
        "SIGKILL in the middle of an epoch": [
            f"{RESUME}[killed: search, 2 processes, 2 workers]",
            f"{RESUME}[killed: train, 1 processes, 2 workers]",
            f"{RESUME}[killed: train, 2 processes, 0 workers]",
        ],
        "SIGKILL while saving": [
            f"{RESUME}[killed in the middle of a write, and between its two renames, it goes on]",
            f"{RESUME}[the state before is taken where of the last one one bit of a tensor is flipped]",
            f"{RESUME}[the state before is taken where of the last one it is cut short]",
            f"{RESUME}[the state before is taken where of the last one it is empty]",
            f"{CHECKPOINT}the_two_newest_are_kept",
            f"{CHECKPOINT}a_damaged_newest_falls_back_to_the_one_before",
            f"{CHECKPOINT}two_damaged_ones_are_refused",
            f"{CHECKPOINT}partial_files_of_a_killed_run_are_swept",
            "test_files.py::test_a_kill_while_saving_keeps_the_old_file",
        ],
        "disk full while saving": [f"{CHECKPOINT}a_full_disk_keeps_what_is_there"],
        "SIGTERM, SIGINT, preemption": [
            f"{RESUME}[stopped: search, 1 processes, 0 workers]",
            f"{RESUME}[stopped: train, 2 processes, 2 workers]",
            f"{RESUME}[stopped while it reads the cases, it dies at once, and starts again]",
            f"{RESUME}[Ctrl-C stops a command and its workers, and the line that it leaves continues it]",
            f"{RESUME}[torchrun passes a signal on to ranks that stop after the same step, and starts them again]",
            f"{LAUNCH}a_signal_stops_the_workers_and_starts_none_again",
            f"{LAUNCH}workers_that_do_not_stop_are_killed_in_time",
            f"{LAUNCH}two_nodes_of_which_one_gets_the_signal",
            f"{LAUNCH}a_job_that_is_warned_is_queued_again_and_no_other",
            f"{LAUNCH}a_search_goes_on_where_its_job_was_interrupted",
        ],
        "one rank dies or raises": [
            f"{RESUME}[where a rank dies, the others say in one line that it is gone, and the run goes on]",
            f"{RESUME}[where a rank hangs, the others wait for --timeout_minutes and name it]",
            f"{RESUME}[a case that one rank cannot read ends all]",
            "test_runtime.py::test_processes_that_do_not_meet_are_told",
            f"{LAUNCH}a_node_with_bad_input_ends_both",
        ],
        "torchrun --max-restarts": [
            f"{LAUNCH}the_run_goes_on_after_a_worker_failed_and_after_each_rank_was_killed",
            f"{LAUNCH}two_nodes_go_on_after_one_lost_its_worker_and_after_it_died_and_came_back",
        ],
        "non-finite loss on one rank": [
            f"{RESUME}[a loss of one rank that is not finite changes no rank's weights, and many in a row stop all]",
            f"{ENGINE}a_step_whose_loss_is_not_finite_changes_nothing",
            f"{ENGINE}many_in_a_row_are_an_error_with_the_first_ones_iteration_and_cases",
            f"{ENGINE}gradients_that_the_fp16_scaler_refuses_are_no_error",
            f"{CHECKPOINT}weights_that_are_not_finite_are_not_saved",
        ],
        "world size changes between stop and resume": [
            f"{RESUME}[another number of processes is refused, or allowed and said to change the result]",
            f"{CHECKPOINT}another_number_of_processes_needs_a_flag",
        ],
        "resume with other data or other flags": [
            f"{CHECKPOINT}every_setting_that_differs_is_named",
            f"{CHECKPOINT}the_configuration_knows_contents_but_not_places",
        ],
        "two runs in one output folder": [
            "test_runtime.py::test_a_second_run_in_the_folder_is_refused_until_the_first_ends",
            "test_runtime.py::test_a_kill_frees_the_folder_though_a_worker_lives_on",
        ],
        "non-empty output folder of another run": [
            "test_stages.py::test_another_run_is_not_overwritten",
            f"{CHECKPOINT}results_without_a_state_are_not_overwritten",
        ],
        "port in use": [f"{LAUNCH}a_port_in_use_is_no_matter_on_one_node_and_told_on_several"],
        "output folder read-only": ["test_runtime.py::test_a_run_folder_that_cannot_be_made_is_refused"],
        "GPU or host memory exhausted": [
            f"{CHECKPOINT}exhausted_memory_names_the_flags_that_lower_it",
            f"{CHECKPOINT}memory_that_is_really_exhausted_is_told",
            f"{RESUME}[where a process that prepares batches is killed, one line says so, and the run goes on]",
        ],
    },
    "Data": {
        "fewer cases than ranks; a rank without validation cases": [
            "test_distributed.py::test_fewer_validation_cases_than_ranks",
            f"{ENGINE}a_rank_without_cases_takes_part",
        ],
        "unequal training steps per rank": ["test_distributed.py::test_ranks_hold_identical_states"],
        "class absent from all validation cases": [f"{ENGINE}absent_classes_are_not_counted_but_false_positives_are"],
        "empty reference but a non-empty prediction": [
            f"{ENGINE}absent_classes_are_not_counted_but_false_positives_are"
        ],
        "truncated gzip; damaged bytes (CRC); wrong sizeof_hdr": [
            f"{BAD}[{row}]"
            for row in ("truncated gzip", "one flipped bit", "label: one flipped bit", "wrong sizeof_hdr")
        ],
        "header that claims 30000 x 30000 x 30000": [f"{BAD}[absurd dimensions]"],
        "image and label of different shape, or same shape and different affine": [
            f"{BAD}[label: other shape]",
            f"{BAD}[label: other origin]",
            f"{BAD}[label: other spacing]",
        ],
        "4D image for a one-channel task; 4D label": [f"{BAD}[4D]", f"{BAD}[label: 4D]"],
        "label values 7, -1, 256, NaN, 1.4": [f"{BAD}[label {value}]" for value in ("7", "-1", "256", "NaN", "1.4")],
        "NaN or Inf voxel": [
            f"{BAD}[NaN voxel]",
            f"{BAD}[infinite voxel]",
            "test_bad_input.py::test_what_is_unusual_is_accepted_and_prepared_as_ever[NaN voxel, replaced]",
        ],
        "volume smaller than the patch": [f"{ENGINE}sliding_window_scores_every_voxel_of_any_size"],
        "missing files": [f"{BAD}[files missing]", f"{DATASET}missing_files_are_counted_and_the_first_named"],
        "malformed JSON, missing keys, wrong types": [
            f"{BAD}[malformed JSON]",
            f"{BAD}[no classes]",
            "test_tasks.py::test_json_that_cannot_be_read",
            "test_tasks.py::test_description_that_is_no_task",
            "test_tasks.py::test_description_that_lacks_a_key",
            f"{DATASET}a_malformed_case_list_is_named",
        ],
        "../.., absolute paths, symlinks that leave the root": [
            f"{BAD}[outside by ..]",
            f"{BAD}[outside, absolute]",
            f"{BAD}[outside by a link]",
        ],
        "fold out of range, -1, more folds than cases": [
            f"test_stages.py::test_bad_input_is_refused_before_training[{row}]"
            for row in ("fold", "negative fold", "more folds than cases")
        ],
    },
    "Architecture files and checkpoints": {
        "malicious pickle": [
            f"{ARCHITECTURE}malicious_file",
            f"{SECURITY}scripts_run_nothing_from_a_malicious_file",
            f"{SECURITY}only_what_arrays_need_is_called",
        ],
        "truncated, empty or foreign file": [
            f"{ARCHITECTURE}truncated_file",
            f"{ARCHITECTURE}foreign_file",
            f"{SECURITY}a_bad_file_ends_a_script_with_one_line",
        ],
        "missing key, codes, rows, paths, nodes": [
            f"{ARCHITECTURE}faulty_content",
            f"{SECURITY}every_script_says_the_same_of_an_architecture",
        ],
        "other blocks or depths": [
            f"{ARCHITECTURE}size_that_the_caller_does_not_have",
            f"{SECURITY}an_architecture_of_another_size_is_not_trained",
        ],
        "weights of another architecture": [f"{SECURITY}weights_of_another_network_are_refused"],
        "legacy NumPy files": [f"{ARCHITECTURE}published_file"],
        "one-bit damage in tensor data": [f"{CHECKPOINT}every_flipped_bit_of_a_tensor_is_noticed"],
    },
    "Download and extraction": {
        "root exists": [
            f"{DOWNLOAD}complete_folder_is_left_alone",
            f"{DOWNLOAD}incomplete_folder_is_repaired_and_own_files_are_kept",
        ],
        "no md5 given; HTML with status 200; cut without a length; stale partial": [
            f"{DOWNLOAD}recovers",
            f"{DOWNLOAD}gives_up",
            f"{DOWNLOAD}partial_of_an_earlier_run_is_continued_and_a_foreign_one_is_not",
        ],
        "404, 500, timeouts, a server that hangs": [f"{DOWNLOAD}recovers", f"{DOWNLOAD}gives_up"],
        "server without Range, or that answers 200 to a Range request": [f"{DOWNLOAD}recovers"],
        "file:// or http:// URL, redirect off https": [
            f"{DOWNLOAD}https_is_not_left",
            f"{DOWNLOAD}bad_flags_are_refused_at_once",
        ],
        "member with ../, absolute path, symlink, hard link, device, FIFO": [
            f"{DOWNLOAD}nothing_of_a_bad_archive_is_written",
            f"{DOWNLOAD}caps_on_an_archive",
        ],
        "archive cut at a member boundary": [f"{DOWNLOAD}archive_that_is_not_whole"],
        "interrupted extraction": [
            f"{DOWNLOAD}interrupted_unpacking_leaves_no_folder_and_is_done_again",
            f"{DOWNLOAD}run_killed_in_the_moment_of_replacement",
        ],
        "disk too small": [
            f"{DOWNLOAD}too_small_a_disk_is_refused_before_the_body_is_read",
            f"{DOWNLOAD}too_small_a_disk_for_unpacking",
        ],
        "permission denied at the final move": [f"{DOWNLOAD}failure_of_the_final_move_is_an_error_and_loses_nothing"],
    },
}
TESTS = {test for table in FAULTS.values() for tests in table.values() for test in tests}
