resource "google_artifact_registry_repository" "images" {
  repository_id = "gemma-export"
  location      = var.region
  format        = "DOCKER"
  description   = "Images of the dispatcher and the exporter; deployed by digest."

  # Cloud Run keeps a copy of what it runs; these are to roll back to, and the layers of the last builds.
  cleanup_policies {
    id     = "keep-the-newest"
    action = "KEEP"

    most_recent_versions {
      keep_count = 20
    }
  }

  cleanup_policies {
    id     = "delete-old"
    action = "DELETE"

    condition {
      tag_state  = "ANY"
      older_than = "7776000s" # 90 days
    }
  }

  depends_on = [google_project_service.used]
}

# What `gcloud builds submit` uploads.
resource "google_storage_bucket" "builds" {
  name                        = "${var.project_id}-gemma-export-builds"
  location                    = var.region
  uniform_bucket_level_access = true
  public_access_prevention    = "enforced"
  force_destroy               = true

  lifecycle_rule {
    condition {
      age = 30
    }

    action {
      type = "Delete"
    }
  }

  depends_on = [google_project_service.used]
}

resource "google_service_account" "builder" {
  account_id   = "gemma-export-builder"
  display_name = "gemma-export: builds, tests and deploys images"

  depends_on = [google_project_service.used]
}

resource "google_artifact_registry_repository_iam_member" "builder" {
  repository = google_artifact_registry_repository.images.name
  location   = var.region
  role       = "roles/artifactregistry.writer"
  member     = google_service_account.builder.member
}

resource "google_storage_bucket_iam_member" "builder" {
  bucket = google_storage_bucket.builds.name
  role   = "roles/storage.objectViewer"
  member = google_service_account.builder.member
}

resource "google_project_iam_member" "builder" {
  project = var.project_id
  role    = "roles/logging.logWriter"
  member  = google_service_account.builder.member
}

# gcloud waits for what it has started, which is the project's and not the service's.
resource "google_project_iam_member" "builder_waits" {
  project = var.project_id
  role    = google_project_iam_custom_role.this["OperationReader"].id
  member  = google_service_account.builder.member
}

resource "google_cloud_run_v2_service_iam_member" "builder" {
  for_each = local.functions

  name     = google_cloud_run_v2_service.function[each.key].name
  location = var.region
  role     = "roles/run.developer"
  member   = google_service_account.builder.member
}

resource "google_cloud_run_v2_job_iam_member" "builder" {
  name     = google_cloud_run_v2_job.exporter.name
  location = var.region
  role     = "roles/run.developer"
  member   = google_service_account.builder.member
}

# Whoever deploys a revision has to be allowed to act as the account that it runs as.
resource "google_service_account_iam_member" "builder" {
  for_each = google_service_account.runtime

  service_account_id = each.value.name
  role               = "roles/iam.serviceAccountUser"
  member             = google_service_account.builder.member
}
